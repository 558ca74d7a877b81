"""The relation between a SAM's image embedding and its mask tokens (InfoSAM, Eq. 8 and 9)."""

from os import PathLike
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from renyi_kd._autograd import needs_plain_formulas
from renyi_kd._checks import (
    check_choice,
    check_floating,
    check_integer,
    check_same_device,
)
from renyi_kd._precision import compute_dtype
from renyi_kd.infosam.hub import for_hub, from_hub
from renyi_kd.infosam.operators.folding import fold_query
from renyi_kd.infosam.operators.scores import relation_scores, unit_length

Residual: TypeAlias = Literal["raw", "normalized"]
Self = TypeVar("Self", bound="RelationModule")


class RelationModule(nn.Module):
    r"""Attention-based relation module (InfoSAM, Sec. 4.2, Fig. 3).

    .. math::
        Q &= W_Q \operatorname{LayerNorm}(z_m) + b_Q, \qquad
        K = W_K \operatorname{LayerNorm}(z_i) + b_K && \text{(Eq. 8)} \\
        S &= Q K^\top / \sqrt{D} + z_m z_i^\top && \text{(Eq. 9)}

    The relation is :math:`S`, scaled to unit length over all tokens and pixels of a sample. Teacher
    and student share one module.

    Args:
        dim: number of channels :math:`D` of image embedding and mask tokens.
        residual: `"raw"` adds :math:`z_m z_i^\top` as in Eq. 9; `"normalized"` adds
            :math:`\operatorname{LayerNorm}(z_m) \operatorname{LayerNorm}(z_i)^\top`, as the
            authors' release does.

    Raises:
        ValueError: an unknown `residual`, or `dim` < 1.

    Shape:
        - image_embedding: `(B, D, H, W)`, `(B, H, W, D)` or `(B, P, D)`; if the first two both
          fit, channels first.
        - mask_tokens: `(B, N, D)` or `(B, D)`.
        - relation: `(B, N, P)` with `P = H * W`, in the promoted dtype of features and
          parameters, at least float32. A zero map stays zero.

    Note:
        It computes in the dtype of the result, by IEEE rules whatever autocast and
        `torch.set_float32_matmul_precision` allow, forward and backward. Float32 features beyond
        1e18 overflow to NaN. Nothing of the map's size is kept for backward. There is no second
        derivative backwards, but by `torch.func.hessian` there is.

        The parameters are named as in the authors' release, so that its relation module loads with
        `load_state_dict`.

    Example:
        >>> import torch
        >>> from renyi_kd import RelationModule
        >>> relation = RelationModule(dim=8)
        >>> relation(torch.randn(2, 8, 4, 4), torch.randn(2, 1, 8)).shape
        torch.Size([2, 1, 16])
    """

    def __init__(self, dim: int = 256, *, residual: Residual = "raw") -> None:
        super().__init__()
        dim = check_integer("dim", dim, minimum=1)
        check_choice("residual", residual, get_args(Residual))
        self.dim = dim
        self.residual = residual
        self.query_proj = nn.Linear(dim, dim)
        self.key_proj = nn.Linear(dim, dim)
        self.layer_norm_feat = nn.LayerNorm(dim)
        self.layer_norm_mask = nn.LayerNorm(dim)

    def forward(self, image_embedding: Tensor, mask_tokens: Tensor) -> Tensor:
        """Return the relation of each sample, shape `(B, N, P)`, of unit length a sample."""
        pixels, tokens = flatten_features(image_embedding, mask_tokens, self.dim)
        parameters = list(self.parameters())
        if parameters:
            check_same_device(image_embedding=image_embedding, relation=parameters[0])
        dtype = compute_dtype(pixels, tokens, *parameters)
        if self._can_fold(pixels, tokens, *parameters):
            return unit_length(self._folded_scores(pixels, tokens.to(dtype)))
        with torch.autocast(pixels.device.type, enabled=False):
            return unit_length(self._scores(pixels.to(dtype), tokens.to(dtype)))

    def _folded_scores(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Return what `_scores` does, with the pixels' layers folded into the queries."""
        layers = self.layer_norm_mask, self.query_proj, self.key_proj, self.layer_norm_feat
        query, offset = fold_query(
            tokens,
            *((layer.weight.to(tokens.dtype), layer.bias.to(tokens.dtype)) for layer in layers),
            residual=self.residual == "normalized",
            eps=self.layer_norm_mask.eps,
        )
        residual = tokens if self.residual == "raw" else None
        return relation_scores(pixels, query, residual, offset, self.layer_norm_feat.eps)

    def _scores(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Return the scores by Eq. 8 and 9 as they stand, whatever the layers are."""
        normalized_tokens = _in_dtype_of(tokens, self.layer_norm_mask)
        normalized_pixels = _in_dtype_of(pixels, self.layer_norm_feat)
        query = _in_dtype_of(normalized_tokens, self.query_proj)
        key = _in_dtype_of(normalized_pixels, self.key_proj)
        if self.residual == "raw":
            residual = tokens @ pixels.mT
        else:
            residual = normalized_tokens @ normalized_pixels.mT
        scores: Tensor = query @ key.mT / self.dim**0.5 + residual
        return scores

    def _can_fold(self, *tensors: Tensor) -> bool:
        """Return whether layers do what their weights and biases say, and derivatives are usual."""
        projections = self.query_proj, self.key_proj
        norms = self.layer_norm_mask, self.layer_norm_feat
        return (
            all(_is_plain(layer, nn.Linear, self.dim, self.dim) for layer in projections)
            and all(_is_plain(layer, nn.LayerNorm, self.dim) for layer in norms)
            and not needs_plain_formulas(*tensors)
        )

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return f"dim={self.dim}, residual={self.residual!r}"

    def save_pretrained(self, save_directory: str | PathLike[str], **options: Any) -> str | None:
        """Write `model.safetensors`, `config.json` with `dim` and `residual`, and a model card.

        Args:
            save_directory: the folder, which is made if there is none.
            **options: those of `PyTorchModelHubMixin.save_pretrained` of huggingface_hub, such as
                `push_to_hub=True` and `repo_id`.

        Returns:
            The address of the commit with `push_to_hub=True`, otherwise None.

        Raises:
            ImportError: the extra `hub` is not installed.
            ValueError: the module has other parameters than it was built with.

        Example:
            >>> import os
            >>> from tempfile import TemporaryDirectory
            >>> from renyi_kd import RelationModule
            >>> with TemporaryDirectory() as folder:
            ...     RelationModule(dim=8).save_pretrained(folder)
            ...     sorted(os.listdir(folder))
            ['README.md', 'config.json', 'model.safetensors']
        """
        config = {"dim": self.dim, "residual": self.residual}
        page: str | None = for_hub(self, config).save_pretrained(save_directory, **options)
        return page

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub; return the commit's page.

        Args:
            repo_id: the repository, `"owner/name"`. It is made if there is none.
            **options: those of `PyTorchModelHubMixin.push_to_hub`, such as `private=True`.

        Raises:
            ImportError: the extra `hub` is not installed.
            ValueError: the module has other parameters than it was built with.
        """
        config = {"dim": self.dim, "residual": self.residual}
        return str(for_hub(self, config).push_to_hub(repo_id, **options))

    @classmethod
    def from_pretrained(cls: type[Self], name: str | PathLike[str], **options: Any) -> Self:
        """Return the module that `save_pretrained` wrote, or `push_to_hub` uploaded, in eval mode.

        Args:
            name: a folder, or `"owner/name"` on the Hub.
            **options: those of `PyTorchModelHubMixin.from_pretrained`, such as `revision`, and
                arguments of the class that are to differ from those in `config.json`.

        Raises:
            ImportError: the extra `hub` is not installed.
            RuntimeError: the weights are not those of such a module.
        """
        module: Self = from_hub(cls, str(name), **options)
        return module


def _is_plain(layer: nn.Module, kind: type[nn.Module], *shape: int) -> bool:
    """Return whether a layer is of just this class and shape, with a bias and without hooks."""
    if type(layer) is not kind or layer.weight is None or layer.bias is None:
        return False
    forward_hooks = layer._forward_hooks or layer._forward_pre_hooks
    backward_hooks = layer._backward_hooks or layer._backward_pre_hooks
    # accelerate, for one, replaces the `forward` of a single layer.
    has_own_forward = "forward" in layer.__dict__
    return layer.weight.shape == shape and not (forward_hooks or backward_hooks or has_own_forward)


def _in_dtype_of(x: Tensor, layer: nn.Module) -> Tensor:
    """Return what the layer makes of `x`, with its parameters and buffers in the dtype of `x`."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    floating = {name: tensor for name, tensor in tensors if tensor.is_floating_point()}
    if all(tensor.dtype == x.dtype for tensor in floating.values()):
        result: Tensor = layer(x)
        return result
    converted = {name: tensor.to(x.dtype) for name, tensor in floating.items()}
    result = functional_call(layer, converted, (x,))
    return result


class DotProductRelation(nn.Module):
    r"""The fixed relation :math:`z_m z_i^\top`, without parameters (InfoSAM, Tables 4 and 13).

    Shape:
        As `RelationModule`; :math:`D` is the last axis of the mask tokens.

    Example:
        >>> import torch
        >>> from renyi_kd import DotProductRelation
        >>> DotProductRelation()(torch.randn(2, 8, 4, 4), torch.randn(2, 1, 8)).shape
        torch.Size([2, 1, 16])
    """

    def forward(self, image_embedding: Tensor, mask_tokens: Tensor) -> Tensor:
        """Return the relation of each sample, shape `(B, N, P)`, of unit length a sample."""
        check_floating("mask_tokens", mask_tokens)
        dim = mask_tokens.shape[-1] if mask_tokens.ndim else 0
        pixels, tokens = flatten_features(image_embedding, mask_tokens, dim)
        dtype = compute_dtype(pixels, tokens)
        tokens = tokens.to(dtype)
        if needs_plain_formulas(pixels, tokens):
            return unit_length(tokens @ pixels.to(dtype).mT)
        # A query of zeros leaves the residual alone. An eps of one keeps 1 / deviation finite where
        # a pixel is constant.
        no_query, no_offset = torch.zeros_like(tokens), tokens.new_zeros(tokens.shape[:2])
        return unit_length(relation_scores(pixels, no_query, tokens, no_offset, eps=1.0))


def flatten_features(
    image_embedding: Tensor, mask_tokens: Tensor, dim: int, *, owner: str = ""
) -> tuple[Tensor, Tensor]:
    """Return features of any layout as `(B, P, D)` pixels and `(B, N, D)` tokens.

    Args:
        image_embedding: `(B, D, H, W)`, `(B, H, W, D)` or `(B, P, D)`.
        mask_tokens: `(B, N, D)` or `(B, D)`.
        dim: number of channels :math:`D`.
        owner: whose features they are, for the messages: `"teacher "`, `"student "` or nothing.

    Raises:
        TypeError: a feature is not a floating-point tensor.
        ValueError: a shape does not fit, or batch sizes or devices differ.
    """
    check_floating(f"{owner}image_embedding", image_embedding)
    check_floating(f"{owner}mask_tokens", mask_tokens)
    if image_embedding.ndim == 4 and image_embedding.shape[1] == dim:
        pixels = rearrange(image_embedding, "b d h w -> b (h w) d")
    elif image_embedding.ndim == 4 and image_embedding.shape[3] == dim:
        pixels = rearrange(image_embedding, "b h w d -> b (h w) d")
    elif image_embedding.ndim == 3 and image_embedding.shape[2] == dim:
        pixels = image_embedding
    else:
        raise ValueError(
            f"`{owner}image_embedding` must have shape (B, D, H, W), (B, H, W, D) or (B, P, D) "
            f"with D = {dim}, got {tuple(image_embedding.shape)}. Set `dim` to its channels."
        )
    tokens = mask_tokens.unsqueeze(1) if mask_tokens.ndim == 2 else mask_tokens
    if tokens.ndim != 3 or tokens.shape[2] != dim:
        raise ValueError(
            f"`{owner}mask_tokens` must have shape (B, N, D) or (B, D) with D = {dim}, "
            f"got {tuple(mask_tokens.shape)}."
        )
    if 0 in pixels.shape[1:] or 0 in tokens.shape[1:]:
        raise ValueError(
            f"`{owner}image_embedding` and `{owner}mask_tokens` must not be empty, "
            f"got {tuple(image_embedding.shape)} and {tuple(mask_tokens.shape)}."
        )
    if pixels.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"`{owner}image_embedding` and `{owner}mask_tokens` must have the same batch size, "
            f"got {pixels.shape[0]} and {tokens.shape[0]}. One prompt an image makes one sample."
        )
    check_same_device(
        **{f"{owner}image_embedding": image_embedding, f"{owner}mask_tokens": mask_tokens}
    )
    return pixels, tokens
