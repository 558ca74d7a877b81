"""The systems that carry knowledge from the teacher to the student, one file each."""
