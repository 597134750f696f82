"""Train an ANN with ReLU or QCFS, the first step of hybrid conversion (Rathi et al., ICLR 2020).

    python ann.py --architecture VGG5 --dataset DIGITS --optimizer Adam --learning_rate 1e-3 --epochs 20
    python ann.py --architecture VGG16 --dataset CIFAR10 --learning_rate 0.01 --batch_size 64 --log

The best epoch's weights go to trained_models/ann/<identifier>.pth, which snn.py takes as --pretrained_ann.
"""
from experiment import options


def get_args_parser() -> options.Parser:
    parser = options.Parser(prog='ann.py', description=__doc__)
    options.common_options(parser, learning_rate=1e-2, optimizer='SGD', momentum=0.9, dropout=0.2)
    add = parser.add_argument_group('activations').add_argument
    add('--activation', default='ReLU', choices=['ReLU', 'QCFS'],
        help="QCFS: quantized like a spiking neuron's rate, for conversion to few time steps; default %(default)s")
    add('--levels', type=options.positive_int, default=8, metavar='L', help='of QCFS; default %(default)s')
    add('--bounds', default='layer', choices=['layer', 'channel'],
        help='of QCFS: one bound a layer, or one a channel; default %(default)s')
    add('--batch_norm', action=options.Switch, help='after every layer but the last; conversion folds it')
    parser.add_argument('--pretrained_ann', type=options.not_empty, metavar='FILE',
                        help='start from the weights of this checkpoint, which also gives network and data set if no '
                             'flag does')
    return parser


def main(args):
    # imported here, so that --help and the sweeps do not wait for torch
    from experiment import checkpoint, engine, setup
    from experiment.run import open_run
    from experiment.start import find_ann

    device = setup.set_up_device(args)
    start = find_ann(args)  # locks the run's name as long as it lives

    data = setup.load_data(args)
    engine.seed_all(args.seed)
    model = setup.build_ann(args, data, args.activation, args.levels, args.batch_norm, args.bounds).to(device)
    setup.check_qcfs(model, args)
    optimizer = engine.make_optimizer(model, args)
    if start.resumed:
        checkpoint.load_weights(model, start.state, start.path)
        if not args.test_only:
            engine.load_optimizer(optimizer, start.state, start.path)
    elif start.state:
        start.said.append(setup.load_ann(model, start, data, args))
    run = open_run('ann', args, start, data, model, device, engine.cross_entropy)

    if args.test_only:
        tested = run.test(model, data.test)
        engine.check_finite(tested.loss, 'in the test', model, trains=False)
        run.say(f'ANN: test accuracy {tested.accuracy:.2%} on {len(data.test)} images, loss {tested.loss:.4f}')
        return
    progress = start.progress()
    engine.train(model, optimizer, data, run, progress, chance_epochs=30)
    accuracy, epoch = progress.best
    run.say(f'best {data.selection} accuracy {accuracy:.2%}, of epoch {epoch}: {run.paths.best}')


if __name__ == '__main__':
    options.run(main, get_args_parser().parse_args(), 'ann.py')
