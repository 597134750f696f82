"""Train an ANN without biases, the first step of hybrid conversion (Rathi et al., ICLR 2020).

    python ann.py --architecture VGG5 --dataset DIGITS --epochs 30
    python ann.py --architecture VGG16 --dataset CIFAR10 --learning_rate 0.01 --batch_size 64 --log

The best epoch's weights go to trained_models/ann/<identifier>.pth, which snn.py takes as --pretrained_ann.
"""
from experiment import UserError, options


def get_args_parser():
    parser = options.Parser(prog='ann.py', description=__doc__)
    options.common_options(parser, learning_rate=1e-2, optimizer='SGD', momentum=0.9, dropout=0.2)
    parser.add_argument('--pretrained_ann', type=options.file, metavar='FILE',
                        help='start from the weights of this checkpoint')
    return parser


def main(args):
    # not above: --help and the sweeps need not wait for torch
    from experiment import checkpoint, distributed, engine, files, log, metrics, setup

    device = setup.set_up_device(args)
    checkpoint.check_there(args.pretrained_ann, 'ann')
    name = files.identifier('ann', args)
    paths = files.paths('ann', name)
    source = setup.resume_file(args, paths.last)
    if not args.test_only:
        files.check_writable(paths.best.parent, paths.metrics.parent)
        _lock = files.lock(paths) if distributed.is_main() else None  # held until main() returns
    data = setup.load_data(args)
    engine.seed_all(args.seed)
    model = setup.build_ann(args, data).to(device)
    optimizer = engine.make_optimizer(model, args)
    notes, state = setup.notes(args, device), None

    if source:
        state = checkpoint.load(source, 'ann')
        checkpoint.load_weights(model, state, source)
        engine.resume_optimizer(optimizer, state, source, args)
        notes.append(f"resumed from {source}, after epoch {state['epoch']}")
    elif args.pretrained_ann:
        last_layer = list(model.state_dict())[-1]
        loaded = checkpoint.load(args.pretrained_ann, 'ann')
        new = checkpoint.load_weights(model, loaded, args.pretrained_ann, may_differ=[last_layer])
        notes.append(f'weights from {args.pretrained_ann}' + (
            f'; its {last_layer} is for other classes, so that one starts anew' if new else ''))
    elif args.test_only:
        raise UserError('--test_only: name the network with --pretrained_ann or --resume')
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
    best = engine.fit(model, optimizer, data, engine.cross_entropy, device, args, paths, {'classes': data.classes}, say,
                      patience=30, fresh=not own, history=state['history'] if state else [],
                      done=state['epoch'] if state else 0, best=state['best'] if own else None, board=board)
    say(f'best {data.selection} accuracy {best[0]:.2%}, of epoch {best[1]}: {paths.best}')


if __name__ == '__main__':
    options.run(main, get_args_parser().parse_args(), 'ann.py')
