"""Fields of known shape, and comparisons by finite differences."""

import torch

from limbeck.rendering.fields import RadianceField


class Ball(RadianceField):
    """A ball of constant density and colour within the cube of half-side 1."""

    def __init__(self, density=2.0, radius=0.6, colour=(0.9, 0.2, 0.1)):
        super().__init__(1.0, None, "softplus", 1e-3)
        self.sigma = torch.nn.Parameter(torch.tensor(density))
        self.radius, self.colour = radius, torch.tensor(colour)

    def raw(self, points):
        level = 10 * (self.radius - points.norm(dim=-1, keepdim=True))
        return torch.cat((level, torch.logit(self.colour).to(points).expand(len(points), 3)), -1)

    def forward(self, points):
        return self.density(points), self.colour.to(points).expand(len(points), 3)

    def density(self, points):
        return self.sigma * (points.norm(dim=-1) < self.radius)


def icosphere(cuts=3):
    """Vertices (n, 3) on the unit sphere and faces (m, 3) that look outwards."""
    vertices = [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)]
    faces = [(0, 1, 2), (0, 2, 3), (0, 3, 4), (0, 4, 1), (5, 2, 1), (5, 3, 2), (5, 4, 3), (5, 1, 4)]
    for _ in range(cuts):
        middle, finer = {}, []

        def between(a, b, middle=middle):
            key = (min(a, b), max(a, b))
            if key not in middle:
                point = torch.tensor(vertices[a]) + torch.tensor(vertices[b])
                vertices.append(tuple((point / point.norm()).tolist()))
                middle[key] = len(vertices) - 1
            return middle[key]

        for a, b, c in faces:
            ab, bc, ca = between(a, b), between(b, c), between(c, a)
            finer += [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
        faces = finer
    return torch.tensor(vertices), torch.tensor(faces)


def slope(function, tensor, direction, step=1e-5):
    """The directional derivative of a scalar function by central differences; `tensor` is changed and put back."""
    with torch.no_grad():
        start = tensor.clone()
        values = []
        for sign in (1, -1):
            tensor.copy_(start + sign * step * direction)
            values.append(float(function()))
        tensor.copy_(start)
    return (values[0] - values[1]) / (2 * step)


def assert_gradients_match(function, tensors, tolerance=1e-6):
    """Compares autograd with finite differences along one random direction for each tensor, in float64."""
    generator = torch.Generator().manual_seed(9)
    gradients = torch.autograd.grad(function(), tensors)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        expected = slope(function, tensor, direction)
        assert abs(expected) > 1e-9, "the gradient vanishes, so that the comparison says nothing"
        assert abs(float((gradient * direction).sum()) - expected) < tolerance * max(1.0, abs(expected))
