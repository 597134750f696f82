"""Convert an ANN into a spiking network and fine-tune it with STDB (Rathi et al., ICLR 2020).

    python snn.py --architecture VGG5 --dataset DIGITS --pretrained_ann trained_models/ann/ann_vgg5_digits.pth \\
                  --timesteps 20 --epochs 10
    python snn.py --architecture VGG5 --dataset DIGITS --pretrained_snn trained_models/snn/snn_vgg5_digits_20.pth \\
                  --test_only

Without a pretrained file it trains from scratch. The best epoch's network goes to
trained_models/snn/<identifier>.pth; a converted network counts as epoch 0.
"""
from experiment import options


def get_args_parser():
    parser = options.Parser(prog='snn.py', description=__doc__)
    options.common_options(parser, learning_rate=1e-4, optimizer='Adam', momentum=0.95, dropout=0.3)
    add = parser.add_argument_group('start').add_mutually_exclusive_group().add_argument
    add('--pretrained_ann', type=options.file, metavar='FILE', help='convert the ANN of this checkpoint')
    add('--pretrained_snn', type=options.file, metavar='FILE',
        help='go on from, or evaluate, the SNN of this checkpoint')
    add = parser.add_argument_group('spiking').add_argument
    add('--timesteps', type=options.positive_int, default=100, metavar='T', help='default %(default)s')
    add('--leak', type=options.fraction, default=1.0, metavar='L', help='in (0, 1]; 1 is IF; default %(default)s')
    add('--default_threshold', type=options.positive, default=1.0, metavar='V',
        help='of layers that are not balanced; default %(default)s')
    add('--activation', default='STDB', choices=['STDB', 'Linear'], help='surrogate gradient; default %(default)s')
    add('--alpha', type=options.non_negative, default=0.3, metavar='X', help='height of STDB; default %(default)s')
    add('--beta', type=options.non_negative, default=0.01, metavar='X', help='decay of STDB; default %(default)s')
    add('--gamma', type=options.non_negative, default=0.3, metavar='X', help='height of Linear; default %(default)s')
    add('--output', default='mean', choices=['mean', 'sum'],
        help='what the loss sees of the output over time; the published code summed; default %(default)s')
    add('--backend', choices=['torch', 'triton'],
        help='what runs the neurons: plain torch or fused CUDA kernels; default triton on CUDA, else torch')
    add = parser.add_argument_group('conversion').add_argument
    add('--scaling_factor', type=options.positive, default=0.7, metavar='X',
        help='balanced thresholds are multiplied by it; default %(default)s')
    add('--calibration_samples', type=options.positive_int, default=512, metavar='N',
        help='training images that thresholds are balanced on; default %(default)s')
    add('--calibration_timesteps', type=options.positive_int, default=1000, metavar='T',
        help='time steps that thresholds are balanced over; default %(default)s')
    add = parser.add_argument_group('messages').add_argument
    add('--test_acc_every_batch', action=options.Switch, help='say the accuracy after every test batch')
    add('--train_acc_batches', type=options.positive_int, default=200, metavar='N',
        help='say training accuracy after every N batches; default %(default)s')
    return parser


def main(args):
    import torch.nn.functional as F  # not above: --help and the sweeps need not wait for torch

    from experiment import checkpoint, engine, files, log, setup
    from experiment.convert import convert

    device = setup.set_up_device(args)
    setup.choose_backend(args, device)
    data = setup.load_data(args)
    notes, state = [], None
    if args.pretrained_snn:
        state = checkpoint.load(args.pretrained_snn, 'snn')
        notes.append(setup.adopt(args, state, args.pretrained_snn))
    name = files.identifier('snn', args)
    paths = files.paths('snn', name)
    source = setup.resume_file(args, paths[1])
    if source:
        state = checkpoint.load(source, 'snn')
        notes.append(f'resumed after epoch {state.get("epoch")}; ' + setup.adopt(args, state, source))
        name = files.identifier('snn', args)
        paths = files.paths('snn', name)

    engine.seed_all(args.seed)
    model = setup.build_snn(args, data).to(device)
    optimizer = engine.make_optimizer(model, args)
    if state:
        checkpoint.load_snn(model, state, source or args.pretrained_snn)
    if source:
        engine.resume_optimizer(optimizer, state, source, args)
    if not args.test_only:
        files.check_writable(paths)
        _lock = files.lock(paths)  # held until main() returns
    if args.timesteps <= model.depth:
        notes.append(f'--timesteps {args.timesteps}: each of the {model.depth} spiking layers delays by one step, so '
                     f'no spike reaches the output of {args.architecture} in fewer than {model.depth + 1}')

    say = log.open_log('snn', name, args.log)
    say(log.header(args, model, device))
    for note in notes:
        say(note)

    def loss_function(logits, labels):
        # the output adds up over T steps; see the README on why its mean is what trains
        return F.cross_entropy(logits / args.timesteps if args.output == 'mean' else logits, labels)

    test_say = say if args.test_acc_every_batch else None
    results = []  # (what, accuracy)
    if not source and args.pretrained_ann:
        results.append(('ANN', convert(model, data, device, args, say)))
    say('thresholds: ' + ' '.join(f'{value:.4g}' for value in model.thresholds))
    # what a checkpoint holds beside the weights; thresholds are as used, that is scaled
    extra = {'thresholds': list(model.thresholds), 'timesteps': model.timesteps, 'leak': model.leak,
             'activation': model.activation}
    own = files.is_own(source, paths)
    done, best, fresh = state['epoch'] if source else 0, state['best'] if own else None, not own
    if args.test_only or not source and (args.pretrained_ann or args.pretrained_snn):
        # a curve costs nothing: logits after t steps are W times the spikes so far
        at = sorted({max(1, args.timesteps * i // 10) for i in range(1, 11)})
        start, curve = engine.test_over_time(model, data, loss_function, device, args, test_say, at)
        what = 'loaded' if state else 'converted' if args.pretrained_ann else 'untrained'
        results.append((f'{what} SNN', start.accuracy))
        say(f'{what} SNN: test accuracy {start.accuracy:.2%} at T = {args.timesteps}, loss {start.loss:.4f}')
        say('test accuracy after time steps: ' + ', '.join(f'{t}: {value:.2%}' for t, value in zip(at, curve)))
        if not args.test_only:
            best, fresh = [start.accuracy, 0], False
            files.set_aside(paths, say)
            engine.save(paths, True, best, model, optimizer, args, accuracy=start.accuracy, epoch=0, **extra)
    if not args.test_only:
        best = engine.fit(model, optimizer, data, loss_function, device, args, paths, extra, say, patience=5,
                          fresh=fresh, done=done, best=best, train_say_every=args.train_acc_batches,
                          test_say=test_say)
        results.append((f'SNN, best epoch ({best[1]})', best[0]))
    say('\n'.join(['', f'{"":<24}{"test accuracy":>14}{"time steps":>12}',
                   *(f'{what:<24}{accuracy:>14.2%}{"-" if what == "ANN" else args.timesteps:>12}'
                     for what, accuracy in results)]))
    if not args.test_only:
        say(f'saved in {paths[0]}')


if __name__ == '__main__':
    options.run(main, get_args_parser().parse_args(), 'snn.py')
