"""What former versions and the published code wrote, in today's form: the one place that knows them. No torch."""

PRETRAINED = ('pretrained_ann', 'pretrained_snn')
# the values of flags that a former version did not have
_ALL = {'lr_schedule': 'step', 'cutout': 0, 'crop': 4, 'label_smoothing': 0.0}
_ANN = {'activation': 'ReLU', 'levels': 8, 'batch_norm': False}
_SNN = {'encoding': 'poisson', 'delay': 1, 'initial_potential': 0.0, 'learn_threshold': False, 'learn_leak': False,
        'keep_batch_norm': False}
# settings that a cache of thresholds does not name
CACHE_KEY = {'percentile': 100.0, 'encoding': 'poisson', 'delay': 1, 'initial_potential': 0.0, 'carried': False,
             'code': None}
_CLASSES = {'STDPSpike': 'STDB', 'LinearSpike': 'Linear'}  # surrogates, as published files name them


def arguments(args: dict, spiking: bool) -> dict:
    """A run's arguments, with those that its version did not have. spiking: whether they are of snn.py."""
    percentile = {'threshold_percentile': 100.0} if 'scaling_factor' in args else {}
    known = {**_ALL, **(_SNN if spiking else _ANN), **percentile}
    return args | {flag: value for flag, value in known.items() if flag not in args}


def checkpoint(state: dict) -> dict:
    """What a checkpoint holds. Its args is a dict; an ANN's may be {}, as the names of the weights say its layers."""
    args = dict(state['args']) if isinstance(state.get('args'), dict) else {}
    if 'trained_on' not in state:  # resumed runs did not keep what they had begun with
        args = {flag: value for flag, value in args.items() if flag not in PRETRAINED or value}
    if 'timesteps' not in state:
        return {**state, 'args': args}
    args = {'output': 'mean', **arguments(args, spiking=True)}  # only a conversion fits the output
    upgraded = {'leak': state.get('leak_mem'), **state, 'args': args}
    if isinstance(name := state.get('activation'), str):
        upgraded['activation'] = _CLASSES.get(name, name)
    return upgraded
