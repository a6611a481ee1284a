"""Scenes that can be rendered and trained: cameras, radiance fields, Gaussians, meshes and plain images.

World axes: z points up, azimuth 0 is +x. Camera axes: x right, y up, the camera looks along its -z.
"""
