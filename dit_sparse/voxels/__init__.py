"""Sets of voxels as token layouts, for 3-D generation."""
