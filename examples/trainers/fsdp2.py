"""With FSDP2: `torchrun --nproc-per-node 2 examples/trainers/fsdp2.py --batch-size 2`.

The parameters of the student and of the distiller are divided among the processes. The teacher is
whole on each.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from common import Scenes, distilled_sam, losses, optimizer_of, parse, report


def main() -> None:
    """Train for some steps."""
    options = parse(__doc__)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dist.init_process_group()
    model = distilled_sam(options.model).to(device)
    model.distiller.process_group = dist.group.WORLD
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.student.vision_encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    optimizer = optimizer_of(model)
    scenes = Scenes(0, 64)
    batches = DataLoader(
        scenes, options.batch_size, sampler=DistributedSampler(scenes, shuffle=False)
    )
    for step, batch in zip(range(options.steps), batches, strict=False):
        segmentation, distillation = losses(model, {k: v.to(device) for k, v in batch.items()})
        (segmentation + distillation).backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = segmentation.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            report(step, mean, distillation)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
