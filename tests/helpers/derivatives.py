"""Models that differentiate inside: physics-informed, Hamiltonian, energies and forces, Laplacians, inner loops."""

import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from reference import Custom, redraw
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint


def net(d_in=2, d_out=1, width=5):
    return nn.Sequential(nn.Linear(d_in, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, d_out))


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POINTS = drawn(7, 2)


def slope(value, x):
    return torch.autograd.grad(value.sum(), x, create_graph=True)[0]


def heat(m, x):  # u_t - u_xx
    x = x.requires_grad_(True)
    first = slope(m.u(x), x)
    return first[:, :1] - slope(first[:, 1], x)[:, 1:]


def burgers(m, x):  # from separate coordinates, with the value and a data term
    t, s = x[:, :1].detach().requires_grad_(), x[:, 1:].detach().requires_grad_()
    u = m.u(torch.cat([t, s], dim=1))
    u_t, u_s = torch.autograd.grad(u, (t, s), torch.ones_like(u), create_graph=True)
    return torch.cat([u_t + u * u_s - 0.1 * slope(u_s, s), u], dim=1)


def hamiltonian(m, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        dq, dp = slope(m.u(x), x).split(1, dim=1)
    return torch.cat([dp, -dq], dim=1)


def forces(m, positions):
    positions = positions.detach().clone().requires_grad_(True)
    pairs = positions.square().sum(-1, keepdim=True) + (positions[:, :, None] - positions[:, None]).square().sum(-1)
    energy = m.u(torch.exp(-pairs).reshape(len(positions), -1)).sum()
    return -torch.autograd.grad(energy, positions, create_graph=True)[0].flatten(1)


def energy_and_forces(m, positions, charges):
    positions = positions.requires_grad_()
    energy = m.u(torch.cat([positions.flatten(1), charges], dim=1))
    (gradient,) = torch.autograd.grad([energy.sum()], [positions], create_graph=True)
    return torch.cat([energy, -gradient.flatten(1)], dim=1)


def laplacian_loop(m, x):
    x = x.requires_grad_(True)
    first = slope(m.u(x), x)
    return sum(slope(first[:, i], x)[:, i : i + 1] for i in range(x.shape[1]))


def laplacian_hessian(m, x):
    return vmap(lambda one: hessian(lambda y: m.u(y)[0])(one).diagonal().sum())(x)[:, None]


def laplacian_jacfwd(m, x):
    return vmap(lambda one: jacfwd(jacrev(lambda y: m.u(y)[0]))(one).trace())(x)[:, None]


def laplacian_forward_over_reverse(m, x):
    def one(v):
        return jvp(grad(lambda y: m.u(y).sum()), (x,), (v.expand_as(x),))[1] @ v

    return sum(one(v) for v in torch.eye(2, dtype=x.dtype))[:, None]


def laplacian_taylor(m, x):  # forward over forward
    def second(v):
        v = v.expand_as(x)
        return jvp(lambda y: jvp(m.u, (y,), (v,))[1], (x,), (v,))[1]

    return sum(second(v) for v in torch.eye(2, dtype=x.dtype))


def directional(m, x):
    return torch.cat(jvp(m.u, (x,), (torch.ones_like(x),)), dim=1)


def dual(m, x):
    with fwad.dual_level():
        out = m.u(fwad.make_dual(x, torch.ones_like(x)))
        value, tangent = fwad.unpack_dual(out)
    return torch.cat([value, tangent], dim=1)


def hutchinson(m, x):
    x = x.requires_grad_(True)
    score = m.u(x)
    probe = torch.tensor([1.0, -1.0], dtype=x.dtype)
    (product,) = torch.autograd.grad(score, x, probe.expand_as(x), create_graph=True)
    return (product * probe).sum(dim=1, keepdim=True) + 0.5 * score.square().sum(dim=1, keepdim=True)


def vmapped_gradient(m, x):
    return vmap(grad(lambda y: m.u(y).sum()))(x)


def vmapped_hessian(m, x):
    return vmap(hessian(lambda y: m.u(y).sum()))(x).flatten(1)


def called_functionally(m, x):
    parameters = dict(m.u.named_parameters())
    return vmap(lambda one: jacrev(lambda y: functional_call(m.u, parameters, (y,)))(one))(x).flatten(1)


def functional_jacobian(m, x):
    found = torch.autograd.functional.jacobian(lambda y: m.u(y).sum(dim=0), x, create_graph=True)
    return found.transpose(0, 1).flatten(1)


def functional_jvp(m, x):
    return torch.autograd.functional.jvp(m.u, x, torch.ones_like(x), create_graph=True)[1]


def functional_hvp(m, x):
    return torch.autograd.functional.hvp(lambda y: m.u(y).sum(), x, torch.ones_like(x), create_graph=True)[1]


def deeponet(m, sensors, y):
    y = y.requires_grad_()
    branch, trunk = m.branch(sensors), m.trunk(y)
    value = (branch * trunk).sum(dim=1, keepdim=True)
    return torch.cat([value, slope(value, y)], dim=1)


class Cubed(torch.autograd.Function):
    """Its backward differentiates by autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, out):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            return torch.autograd.grad(y**3, y, out)[0]


def own_function(m, x):
    return m.b(Cubed.apply(m.a(x)))


def implicit(m, x):  # a fixed point, with one step of the implicit derivative through a hook
    with torch.no_grad():
        z = torch.zeros(len(x), 4, dtype=x.dtype)
        for _ in range(60):
            z = torch.tanh(m.a(x) + 0.3 * z @ m.w)
    z = torch.tanh(m.a(x) + 0.3 * z @ m.w)
    if z.requires_grad:
        start = z.clone().detach().requires_grad_()
        again = torch.tanh(m.a(x) + 0.3 * start @ m.w)

        def solve(out):
            found = out
            for _ in range(60):
                found = out + torch.autograd.grad(again, start, found, retain_graph=True)[0]
            return found

        z.register_hook(solve)
    return m.b(z)


def inner_loop(m, x):  # one step of SGD on a support set
    support, wanted = m.support.to(x), m.wanted.to(x)
    parameters = dict(m.u.named_parameters())
    loss = F.mse_loss(functional_call(m.u, parameters, (support,)), wanted)
    grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    stepped = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
    return functional_call(m.u, stepped, (x,))


def inner_loop_functional(m, x):
    support, wanted = m.support.to(x), m.wanted.to(x)
    parameters = dict(m.u.named_parameters())

    def loss(values):
        return F.mse_loss(functional_call(m.u, values, (support,)), wanted)

    grads = grad(loss)(parameters)
    return functional_call(m.u, {n: p - 0.1 * grads[n] for n, p in parameters.items()}, (x,))


def adapted_by_sample(m, x):  # each sample takes its own step
    parameters = dict(m.u.named_parameters())

    def one(y):
        grads = grad(lambda p: functional_call(m.u, p, (y,)).sum())(parameters)
        return functional_call(m.u, {n: p - 0.1 * grads[n] for n, p in parameters.items()}, (y,))

    return vmap(one)(x)


def tangent_features(m, x):  # norms of the gradient by the parameters, of each sample
    parameters = dict(m.u.named_parameters())
    rows = vmap(grad(lambda p, y: functional_call(m.u, p, (y,)).sum()), in_dims=(None, 0))(parameters, x)
    return torch.stack([g.flatten(1).square().sum(1) for g in rows.values()], dim=1)


def checkpointed(m, x):
    return m.b(checkpoint(m.u, x.requires_grad_(True), use_reentrant=False))


def checkpointed_slope(m, x):
    x = x.requires_grad_(True)
    return slope(checkpoint(m.u, x, use_reentrant=False), x)


def gradient_penalty(m, x):
    x = x.requires_grad_(True)
    return (slope(m.u(x), x).norm(dim=1, keepdim=True) - 1) ** 2


def kept_graph(m, x):  # TensorFlow style: backward() into x.grad
    x = x.detach().requires_grad_()
    u = m.u(x)
    u.sum().backward(create_graph=True, inputs=[x])
    found, x.grad = x.grad, None
    return torch.cat([u, found], dim=1)


def both(m, x):
    x = x.requires_grad_(True)
    return torch.cat([m.head(slope(m.u(x), x)), m.u(x), m.scale * slope(m.u(x).square(), x)], dim=1)


def linearised(m, x):  # the first-order Taylor model of a network around itself
    parameters = dict(m.u.named_parameters())
    start = {n: p.detach() for n, p in parameters.items()}
    value, change = jvp(
        lambda p: functional_call(m.u, p, (x,)), (start,), ({n: parameters[n] - 0.9 * start[n] for n in start},)
    )
    return value + change


def stopped(m, x):  # a target that is detached by torch.no_grad
    with torch.no_grad():
        target = m.u(x).exp()
    return m.u(x) * target


def first_order(m, x):  # an inner loop without second derivatives
    support, wanted = m.support.to(x), m.wanted.to(x)
    parameters = dict(m.u.named_parameters())
    loss = F.mse_loss(functional_call(m.u, parameters, (support,)), wanted)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    stepped = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
    return functional_call(m.u, stepped, (x,))


def kept_gradients(m, x):  # an inner loop by backward() into the gradients of the parameters
    for parameter in m.u.parameters():
        parameter.grad = None
    F.mse_loss(m.u(m.support.to(x)), m.wanted.to(x)).backward(create_graph=True)
    stepped = {n: p - 0.1 * p.grad for n, p in m.u.named_parameters()}
    for parameter in m.u.parameters():
        parameter.grad = None
    return functional_call(m.u, stepped, (x,))


def hooked(m, x):  # a gradient that is changed on its way
    h = m.u(x)
    if h.requires_grad:
        h.register_hook(lambda gradient: 2 * gradient)
    return h.square()


def attention_slope(m, x):
    x = x.requires_grad_(True)
    tokens = torch.stack([x, x.cos(), x.sin()], dim=1)
    q, k, v = m.qkv(tokens).chunk(3, dim=-1)
    return slope(m.out(F.scaled_dot_product_attention(q, k, v).mean(dim=1)), x)


def module(function, **members):
    return redraw(Custom(function, **members)).double()


def u(function, d_in=2, d_out=1):
    return lambda: module(function, u=net(d_in, d_out))


def support(function):
    def make():
        model = u(function)()
        model.register_buffer("support", drawn(4, 2, seed=1))
        model.register_buffer("wanted", drawn(4, 1, seed=2))
        return model

    return make


PARTS = {"positions": drawn(7, 2, 2), "charges": drawn(7, 2, seed=1)}
SENSORS = {"sensors": drawn(7, 3), "y": drawn(7, 2, seed=1)}

# Name → (model, inputs).
CASES = {
    "heat equation": (u(heat), POINTS),
    "burgers": (u(burgers), POINTS),
    "hamiltonian": (u(hamiltonian), POINTS),
    "forces": (u(forces, 9), drawn(7, 3, 2)),
    "energy and forces of a dict": (u(energy_and_forces, 6), PARTS),
    "laplacian, loop": (u(laplacian_loop), POINTS),
    "laplacian, hessian": (u(laplacian_hessian), POINTS),
    "laplacian, jacfwd of jacrev": (u(laplacian_jacfwd), POINTS),
    "laplacian, jvp of grad": (u(laplacian_forward_over_reverse), POINTS),
    "laplacian, jvp of jvp": (u(laplacian_taylor), POINTS),
    "directional derivative": (u(directional), POINTS),
    "dual level": (u(dual), POINTS),
    "hutchinson": (u(hutchinson, 2, 2), POINTS),
    "vmap of grad": (u(vmapped_gradient), POINTS),
    "vmap of hessian": (u(vmapped_hessian), POINTS),
    "functional_call": (u(called_functionally, 2, 2), POINTS),
    "autograd.functional.jacobian": (u(functional_jacobian, 2, 2), POINTS),
    "autograd.functional.jvp": (u(functional_jvp, 2, 2), POINTS),
    "autograd.functional.hvp": (u(functional_hvp), POINTS),
    "deeponet": (lambda: module(deeponet, branch=net(3, 4), trunk=net(2, 4)), SENSORS),
    "backward of its own": (lambda: module(own_function, a=nn.Linear(2, 4), b=nn.Linear(4, 2)), POINTS),
    "implicit layer": (
        lambda: module(implicit, a=nn.Linear(2, 4), b=nn.Linear(4, 2), w=nn.Parameter(torch.zeros(4, 4))),
        POINTS,
    ),
    "inner loop": (support(inner_loop), POINTS),
    "inner loop, torch.func": (support(inner_loop_functional), POINTS),
    "a step for each sample": (u(adapted_by_sample), POINTS),
    "tangent features": (u(tangent_features), POINTS),
    "checkpoint": (lambda: module(checkpointed, u=net(2, 3), b=nn.Linear(3, 2)), POINTS),
    "slope of a checkpoint": (u(checkpointed_slope), POINTS),
    "gradient penalty": (u(gradient_penalty), POINTS),
    "backward inside": (u(kept_graph), POINTS),
    "traced and derived": (
        lambda: module(both, u=net(), head=nn.Linear(2, 2), scale=nn.Parameter(torch.ones(2))),
        POINTS,
    ),
    "linearised network": (u(linearised), POINTS),
    "target without gradient": (u(stopped), POINTS),
    "inner loop, first order": (support(first_order), POINTS),
    "inner loop, kept gradients": (support(kept_gradients), POINTS),
    "hook of a gradient": (u(hooked), POINTS),
    "slope of attention": (lambda: module(attention_slope, qkv=nn.Linear(2, 12), out=nn.Linear(4, 1)), POINTS),
}
