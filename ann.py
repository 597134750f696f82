"""Train an ANN without biases, the first step of hybrid conversion (Rathi et al., ICLR 2020).

    python ann.py --architecture VGG5 --dataset DIGITS --epochs 30
    python ann.py --architecture VGG16 --dataset CIFAR10 --learning_rate 0.01 --batch_size 64 --log

The best epoch's weights go to trained_models/ann/<identifier>.pth, which snn.py takes as --pretrained_ann.
"""
from experiment import UserError, options


def get_args_parser():
    parser = options.Parser(prog='ann.py', description=__doc__)
    options.common_options(parser, learning_rate=1e-2, optimizer='SGD', momentum=0.9, dropout=0.2)
    add = parser.add_argument_group('activations').add_argument
    add('--activation', default='ReLU', choices=['ReLU', 'QCFS'],
        help="QCFS: quantized as a spiking neuron's rate is, for conversion to few time steps; default %(default)s")
    add('--levels', type=options.positive_int, default=8, metavar='L', help='of QCFS; default %(default)s')
    add('--batch_norm', action=options.Switch, help='behind every layer but the last; conversion folds it')
    parser.add_argument('--pretrained_ann', type=options.file, metavar='FILE',
                        help='start from the weights of this checkpoint')
    return parser


def main(args):
    # not above: --help and the sweeps need not wait for torch
    from experiment import checkpoint, engine, files, log, metrics, setup, split

    device = setup.set_up_device(args)
    if not args.resume:
        checkpoint.check_there(args.pretrained_ann, 'ann')
    name = files.identifier('ann', args)
    paths = files.paths('ann', name)
    _lock = setup.lock(args, paths)  # held until main() returns
    source, said = setup.resume_file(args, paths, 'ann')
    state = None
    if source:
        state = checkpoint.load_training(source, 'ann')
        setup.keep(args, state, source, ['pretrained_ann'])
    elif args.pretrained_ann:
        state = checkpoint.load(args.pretrained_ann, 'ann')
    elif args.test_only:
        raise UserError('--test_only: name the network with --pretrained_ann or --resume')
    if state:
        layers = checkpoint.ann_layers(state)
        vars(args).update({key: value for key, value in layers.items() if key not in args.given})
    idle = setup.drop_idle(args)
    split.choose(args, state, resumed=bool(source))
    data = setup.load_data(args)
    engine.seed_all(args.seed)
    model = setup.build_ann(args, data, args.activation, args.levels, args.batch_norm).to(device)
    optimizer = engine.make_optimizer(model, args)
    notes = setup.notes(args, device) + idle + said

    if source:
        checkpoint.load_weights(model, state, source)
        engine.resume_optimizer(optimizer, state, source, args)
        notes.append(f"resumed from {source}, after epoch {state['epoch']}")
    elif args.pretrained_ann:
        last_layer = list(model.state_dict())[-1]
        new = checkpoint.load_weights(model, state, args.pretrained_ann, may_differ=[last_layer])
        notes.append(f'weights from {args.pretrained_ann}' + (
            f'; its {last_layer} is for other classes, so that one starts anew' if new else ''))
        notes += [] if args.test_only else split.notes(args, data, state, args.pretrained_ann)
    if not args.test_only:
        board = metrics.open_board('ann', name, args.tensorboard)

    say = log.open_log('ann', name, args.log)
    say(log.header(args, model, device))
    for note in notes:
        say(note)
    if args.test_only:
        tested = engine.test(model, data.test, engine.cross_entropy, device, args)
        say(f'ANN: test accuracy {tested.accuracy:.2%} on {len(data.test)} images, loss {tested.loss:.4f}')
        return
    own = files.is_own(source, paths)
    extra = {'classes': data.classes, 'trained_on': split.all_trainings(args, data, state)}
    best = engine.fit(model, optimizer, data, engine.cross_entropy, device, args, paths, extra, say, patience=30,
                      fresh=not own, history=state['history'] if source else [], done=state['epoch'] if source else 0,
                      best=state['best'] if own else None, board=board, trained_as=state['args'] if source else None)
    say(f'best {data.selection} accuracy {best[0]:.2%}, of epoch {best[1]}: {paths.best}')


if __name__ == '__main__':
    options.run(main, get_args_parser().parse_args(), 'ann.py')
