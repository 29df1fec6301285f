"""Meshes of `shapes-3d`: extraction and files, pictures, and distances between two meshes."""
