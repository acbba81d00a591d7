"""What a run keeps on the disk, and what it is measured with."""
