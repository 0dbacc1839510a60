"""ControlNets of Z-Image: networks that steer a run by an image, such as edges, depth or a pose."""
