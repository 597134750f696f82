"""Convert an ANN into a spiking network and fine-tune it with a surrogate gradient (Rathi et al., ICLR 2020).

    python snn.py --pretrained_ann trained_models/ann/ann_vgg5_digits.pth --timesteps 12 --scaling_factor auto \\
                  --epochs 3
    python snn.py --pretrained_snn trained_models/snn/snn_vgg5_digits_12.pth --test_only

A QCFS ANN is converted as it is, the thresholds of another are balanced. Without a pretrained file it trains from
scratch. The best epoch's network goes to trained_models/snn/<identifier>.pth; a converted network counts as epoch 0.
"""
from functools import partial

from experiment import options
from self_models import encoding, surrogate


def get_args_parser() -> options.Parser:
    parser = options.Parser(prog='snn.py', description=__doc__)
    options.common_options(parser, learning_rate=1e-4, optimizer='Adam', momentum=0.95, dropout=0.3)
    add = parser.add_argument_group('start').add_mutually_exclusive_group().add_argument
    add('--pretrained_ann', type=options.not_empty, metavar='FILE',
        help='convert the ANN of this checkpoint, which also gives network and data set if no flag does')
    add('--pretrained_snn', type=options.not_empty, metavar='FILE',
        help='start from the SNN of this checkpoint, or evaluate it')
    add = parser.add_argument_group('spiking').add_argument
    add('--timesteps', type=options.positive_int, default=100, metavar='T', help='default %(default)s')
    add('--leak', type=options.fraction, default=1.0, metavar='L', help='in (0, 1]; 1 is IF; default %(default)s')
    add('--default_threshold', type=options.positive, default=1.0, metavar='V',
        help='of layers that are not balanced; default %(default)s')
    add('--activation', default='STDB', choices=list(surrogate.SURROGATES),
        help='surrogate gradient; default %(default)s')
    add('--encoding', default='poisson', choices=list(encoding.ENCODINGS),
        help='input of the first layer: Poisson spikes, or the image itself at every step; default %(default)s, '
             'for a QCFS ANN direct')
    add('--delay', type=int, default=1, choices=[1, 0],
        help='steps from the input of a neuron to its spike; default %(default)s, for a QCFS ANN 0')
    add('--initial_potential', type=options.below_one, default=0.0, metavar='F',
        help='of every neuron, in thresholds, in [0, 1); default %(default)s, for a QCFS ANN 0.5')
    add('--learn_threshold', action=options.Switch, help='learn a threshold for each layer, with the weights')
    add('--learn_leak', action=options.Switch, help='learn a leak for each layer, with the weights')
    for flag, default in surrogate.FLAGS.items():
        add(f'--{flag}', type=options.positive if flag == 'width' else options.non_negative, default=default,
            metavar='X', help=f'{surrogate.meaning(flag)}; default %(default)s')
    add('--output', default='fitted', choices=['fitted', 'mean', 'sum'],
        help='how the loss reads the output over time: fitted: its mean, which the conversion scales to the units of '
             "the ANN's logits; mean: the plain mean; sum: the sum, as published; default %(default)s")
    add('--backend', choices=['torch', 'triton'],
        help='what runs the neurons: plain torch or fused CUDA kernels; default triton on CUDA, else torch')
    add = parser.add_argument_group('conversion').add_argument
    add('--keep_batch_norm', action=options.Switch,
        help='fine-tune with batch norm in place; the best network is folded when training ends, into NAME.folded.pth')
    add('--scaling_factor', type=options.factor, default=0.7, metavar='X|auto',
        help='balanced thresholds are multiplied by it; auto: tries 0.3 to 1.2 and takes the one nearest to 0.7 that '
             'does about as well as the best; default %(default)s')
    add('--balance_blocks', action=options.Switch,
        help='of a ResNet without batch norm: balance the thresholds of its blocks, too; as published they stay at '
             '--default_threshold')
    add('--threshold_percentile', type=options.percentile, default=100.0, metavar='P',
        help="a layer's threshold is this percentile of its input; default 100: the largest")
    add('--calibration_samples', type=options.positive_int, default=512, metavar='N',
        help='number of images on which thresholds are balanced, auto chooses and the output is fitted; default '
             '%(default)s')
    add('--calibration_timesteps', type=options.positive_int, default=1000, metavar='T',
        help='time steps over which thresholds are balanced; default %(default)s')
    add = parser.add_argument_group('messages').add_argument
    add('--test_acc_every_batch', action=options.Switch, help='say the accuracy after every test batch')
    add('--train_acc_batches', type=options.positive_int, default=200, metavar='N',
        help='say training accuracy after every N batches; default %(default)s')
    add = parser.add_argument_group('results').add_argument
    add('--report', type=options.not_empty, metavar='DIR',
        help='write figures and report.json of the network tested, or of the best epoch, into this folder')
    add('--predict', type=options.not_empty, nargs='+', metavar='IMAGE',
        help='classify these pictures with the network of --pretrained_snn, and do nothing else')
    add('--export_nir', type=options.not_empty, metavar='FILE',
        help='write the network tested, or of the best epoch, for neuromorphic tools (needs the package nir)')
    return parser


def main(args):
    # imported here, so that --help and the sweeps do not wait for torch
    from experiment import checkpoint, distributed, engine, from_ann, nir_export, predict, setup, table
    from experiment.reporting import report
    from experiment.run import open_run
    from experiment.start import find_snn

    device = setup.set_up_device(args)
    if args.predict:
        lines = predict.lines(args, device)
        if distributed.is_main():
            print('\n'.join(lines))
        return
    if args.export_nir:
        nir_export.check(args.export_nir)
    start = find_snn(args, device)  # locks the run's name as long as it lives
    balances = from_ann.balances(args, start)
    if balances:
        from_ann.check_temporary_folder()

    data = setup.load_data(args)
    engine.seed_all(args.seed)
    model = setup.build_snn(args, data, start.state).to(device)
    optimizer = engine.make_optimizer(model, args)
    if start.kind in ('snn', 'resume'):
        checkpoint.load_snn(model, start.state, start.path, leaks='leak' not in args.given)
    if start.resumed and not args.test_only:
        engine.load_optimizer(optimizer, start.state, start.path)
    start.said.extend(setup.check_steps(model, args))
    if args.report:
        report.check(args.report, model)
    if args.export_nir:
        nir_export.to_graph(model, data.input_shape)  # the user's own network may have what NIR does not know
    # the output adds up over T steps; docs/findings.md says why training uses the mean
    loss_function = partial(engine.cross_entropy, scale=1 if args.output == 'sum' else args.timesteps)
    run = open_run('snn', args, start, data, model, device, loss_function)
    progress, found = start.progress(), {}

    if start.kind == 'ann':
        found = convert(model, start.state, balances, data, run)
    elif balances:
        from_ann.scale_thresholds(model, from_ann.balanced_thresholds(model, data, run), data, run)
    elif start.kind == 'scratch':  # also of neurons that take the place of a QCFS
        model.threshold_update(1.0, [args.default_threshold] * len(model.layer_names))
    for what in ['thresholds', *(['leaks'] if args.learn_leak or model.leak is None else [])]:
        run.say(f'{what}: ' + ' '.join(f'{value:.4g}' for value in getattr(model, what).tolist()))

    results = table.Results(start, found, progress, data, run)
    if args.test_only or start.kind in ('ann', 'snn'):  # accuracy over time before training: epoch 0
        results.test_start(model, optimizer)
    if not args.test_only:
        engine.train(model, optimizer, data, run, progress, chance_epochs=5)
    results.say_table()
    if args.keep_batch_norm and not args.test_only:
        model = from_ann.fold_batch_norm(model, data, run)

    if args.report:
        results.report(model)
    if args.export_nir and distributed.is_main():
        run.say(nir_export.export(model, data.input_shape, args.export_nir, architecture=args.architecture,
                                  dataset=args.dataset))


def convert(model, state, balances, data, run):
    """Make a spiking network of the ANN in a checkpoint's `state`; returns what was measured on the way."""
    from experiment import from_ann

    ann = from_ann.copy_ann(model, state, data, run)  # weights, batch norm folded; of QCFS thresholds, too
    found = from_ann.measure_ann(ann, state, data, run)
    if balances:
        thresholds = from_ann.balanced_thresholds(model, data, run)
        found |= from_ann.scale_thresholds(model, thresholds, data, run)
        found |= from_ann.fit_output(model, ann, data, run)
    return found


if __name__ == '__main__':
    options.run(main, get_args_parser().parse_args(), 'snn.py')
