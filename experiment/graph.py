"""The graph of any spiking network, and a pass along it: for reports and NIR files."""
import operator
from functools import reduce

import torch
from torch import fx, nn

from self_models.layers import Scale
from self_models.plain import LIF, HeldDropout, PlainNetwork, Repeat
from self_models.spiking_network import SpikingNetwork
from self_models.traced import givers

NORMS = nn.modules.batchnorm._BatchNorm


def neurons(current: torch.Tensor, layer: str) -> torch.Tensor:
    """Stands for an LIF layer in the graph of a layer-by-layer network."""
    return current


def identity(x: torch.Tensor, name: str) -> torch.Tensor:
    """Stands for a connection without weights, of that name, in the graph of a layer-by-layer network."""
    return x


def graph_of(network: SpikingNetwork) -> fx.Graph:
    """The calls of a spiking network at one time step; of a layer-by-layer one its stages, without dropout."""
    if isinstance(network, PlainNetwork):
        return network._graph
    names = {module: name for name, module in network.named_modules()}
    pools = iter([name for module, name in names.items() if isinstance(module, nn.AvgPool2d)])
    graph = fx.Graph()

    def call(synapse, x):
        if isinstance(synapse, nn.Linear):
            x = graph.call_method('flatten', (x, 1))
        elif synapse is None or isinstance(synapse, Scale):
            x = graph.call_function(identity, (x, layer.rsplit('.residual', 1)[0] + '.identity'))
        return x if synapse is None else graph.call_module(names[synapse], (x,))

    trains = [graph.placeholder('images')]  # of the input and of each LIF layer
    for layer, stage in zip(network.layer_names, network.stages(), strict=True):
        currents = [call(synapse, trains[source + 1]) for source, synapse in stage.inputs]
        current = reduce(lambda a, b: graph.call_function(operator.add, (a, b)), reversed(currents))
        train = graph.call_function(neurons, (current, layer))
        for _ in range(stage.pools):
            train = graph.call_module(next(pools), (train,))
        trains.append(train)
    if hasattr(network, 'final_pool'):
        train = call(network.final_pool, train)
    graph.output(call(network.classifier[-1], train))
    return graph


class Pass(fx.Interpreter):
    """One pass of values along the graph of a spiking network.

    A subclass defines made(). found: {call: what made() returned}, for calls that depend on the images, until their
    last use.
    """

    def __init__(self, network: SpikingNetwork):
        super().__init__(getattr(network, '_space', network), graph=graph_of(network))
        self.network, self.found = network, {}
        self.extra_traceback = False  # it would lengthen a UserError

    def made(self, node: fx.Node, value: object, before: list) -> object:
        """What a subclass finds for a call that gives `value`. before: what it found for the calls that this one uses.
        None for a call that does not depend on the images' values, such as a size."""
        raise NotImplementedError

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        before = [self.found[each] for each in givers(node) if each in self.found]
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if node.op == 'placeholder' or before and isinstance(first, torch.Tensor):
            self.found[node] = self.made(node, value, before)
        for each in self.user_to_last_uses.get(node, ()):
            self.found.pop(each, None)
        return value

    def module_of(self, node: fx.Node) -> nn.Module | None:
        return self.submodules[node.target] if node.op == 'call_module' else None

    def function_of(self, node: fx.Node) -> object:
        """The function, or the name of the method, that a node calls; None of a module, which may be called as one."""
        return node.target if node.op in ('call_function', 'call_method') else None

    def layer_of(self, node: fx.Node) -> str | None:
        """The name of the LIF layer that a call is, or None."""
        if node.target is neurons:
            return node.args[1]
        return node.target if isinstance(self.module_of(node), LIF) else None


class BlankPass(Pass):
    """A Pass of one blank image (1, ...), for the shapes: modules that keep a shape return their input."""

    def call_module(self, target: str, args: tuple, kwargs: dict) -> object:
        if isinstance(self.submodules[target], (LIF, Repeat, HeldDropout, NORMS)):
            return (*args, *kwargs.values())[0]
        return super().call_module(target, args, kwargs)
