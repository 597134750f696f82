"""Convert an ANN into a spiking network and fine-tune it with STDB (Rathi et al., ICLR 2020).

    python snn.py --architecture VGG5 --dataset DIGITS --pretrained_ann trained_models/ann/ann_vgg5_digits.pth \\
                  --timesteps 12 --scaling_factor auto --epochs 3
    python snn.py --pretrained_snn trained_models/snn/snn_vgg5_digits_12.pth --test_only

Without a pretrained file it trains from scratch. The best epoch's network goes to
trained_models/snn/<identifier>.pth; a converted network counts as epoch 0.
"""
from functools import partial

from experiment import UserError, options


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
    add('--encoding', default='poisson', choices=['poisson', 'direct'],
        help='what the first layer is given: Poisson spikes, or the image itself at every step; default %(default)s, '
             'of an ANN of QCFS direct')
    add('--delay', type=int, default=1, choices=[1, 0],
        help='steps from the input of a neuron to its spike; default %(default)s, of an ANN of QCFS 0')
    add('--initial_potential', type=options.below_one, default=0.0, metavar='F',
        help='of every neuron, in thresholds, in [0, 1); default %(default)s, of an ANN of QCFS 0.5')
    add('--learn_threshold', action=options.Switch, help='learn a threshold for each layer, with the weights')
    add('--learn_leak', action=options.Switch, help='learn a leak for each layer, with the weights')
    add('--alpha', type=options.non_negative, default=0.3, metavar='X', help='height of STDB; default %(default)s')
    add('--beta', type=options.non_negative, default=0.01, metavar='X', help='decay of STDB; default %(default)s')
    add('--gamma', type=options.non_negative, default=0.3, metavar='X', help='height of Linear; default %(default)s')
    add('--output', default='fitted', choices=['fitted', 'mean', 'sum'],
        help="what the loss sees of the output over time: its mean in the units of the ANN's logits, by a factor that "
             'conversion puts into the last weights; the plain mean; or, as published, the sum; default %(default)s')
    add('--backend', choices=['torch', 'triton'],
        help='what runs the neurons: plain torch or fused CUDA kernels; default triton on CUDA, else torch')
    add = parser.add_argument_group('conversion').add_argument
    add('--scaling_factor', type=options.factor, default=0.7, metavar='X|auto',
        help='balanced thresholds are multiplied by it; auto: of those that do best at these time steps by the one '
             'nearest to 0.7; default %(default)s')
    add('--threshold_percentile', type=options.percentile, default=100.0, metavar='P',
        help="a layer's threshold is this percentile of its input; default 100: the largest")
    add('--calibration_samples', type=options.positive_int, default=512, metavar='N',
        help='training images that thresholds are balanced on, and images that auto looks at and the output is fitted '
             'on; default %(default)s')
    add('--calibration_timesteps', type=options.positive_int, default=1000, metavar='T',
        help='time steps that thresholds are balanced over; default %(default)s')
    add = parser.add_argument_group('messages').add_argument
    add('--test_acc_every_batch', action=options.Switch, help='say the accuracy after every test batch')
    add('--train_acc_batches', type=options.positive_int, default=200, metavar='N',
        help='say training accuracy after every N batches; default %(default)s')
    add = parser.add_argument_group('results').add_argument
    add('--report', type=options.file, metavar='DIR',
        help='write figures and report.json of the network tested, or of the best epoch, into this folder')
    add('--predict', type=options.file, nargs='+', metavar='IMAGE',
        help='say what the network of --pretrained_snn takes these pictures for, and do nothing else')
    add('--export_nir', type=options.file, metavar='FILE',
        help='write the network tested, or of the best epoch, for neuromorphic tools (needs the package nir)')
    return parser


def main(args):
    # not above: --help and the sweeps need not wait for torch
    from experiment import (
        checkpoint,
        distributed,
        engine,
        files,
        log,
        metrics,
        nir_export,
        predict,
        report,
        setup,
        split,
    )
    from experiment.convert import MEASURED, balance_untrained, convert, take_defaults

    if args.export_nir:
        nir_export.check(args.export_nir)
    device = setup.set_up_device(args)
    setup.choose_backend(args, device)
    if args.predict:
        if not args.pretrained_snn:
            raise UserError('--predict: name the network with --pretrained_snn')
        print('\n'.join(predict.lines(args.pretrained_snn, args, device)))
        return
    if not args.resume:
        checkpoint.check_there(args.pretrained_ann, 'ann')
    name, paths, _lock, source, state, said = setup.open_snn(args)  # the lock is held until main() returns
    start = state or args.pretrained_ann and checkpoint.load(args.pretrained_ann, 'ann')
    notes = setup.notes(args, device) + setup.drop_idle(args) + said
    notes += [] if state else take_defaults(args, start)
    if args.output == 'fitted' and not state and not args.pretrained_ann:
        if 'output' in args.given:
            raise UserError("--output fitted: fits the output to an ANN's; name one with --pretrained_ann")
        args.output = 'mean'

    split.choose(args, start, resumed=bool(source))
    data = setup.load_data(args)
    if start and not source:
        notes += split.notes(args, data, start, args.pretrained_snn or args.pretrained_ann)
    engine.seed_all(args.seed)
    model = setup.build_snn(args, data, start).to(device)
    optimizer = engine.make_optimizer(model, args)
    if state:
        checkpoint.load_snn(model, state, source or args.pretrained_snn)
    if source:
        engine.resume_optimizer(optimizer, state, source, args)
    if not args.test_only:
        board = metrics.open_board('snn', name, args.tensorboard)
    if args.report:
        report.check(args.report, model)
    if silent := setup.too_few_steps(model):
        if distributed.wanted() and not args.test_only:  # DistributedDataParallel wants a gradient
            raise UserError(silent)
        notes.append(silent)

    say = log.open_log('snn', name, args.log)
    say(log.header(args, model, device))
    for note in notes:
        say(note)

    # the output adds up over T steps; see the README on why its mean is what trains
    loss_function = partial(engine.cross_entropy, scale=1 if args.output == 'sum' else args.timesteps)

    def time_steps(points):
        return sorted({max(1, args.timesteps * i // points) for i in range(1, points + 1)})

    test_say = say if args.test_acc_every_batch else None
    chosen_on = 'test' if args.test_only else data.selection  # the set that accuracies are of
    results, found = [], {}  # (what, accuracy); what the conversion measured
    if not source and args.pretrained_ann:
        found = convert(model, start, data, chosen_on, device, args, say)
        results.append(('ANN', found['ann_accuracy']))
    elif not state and 'default_threshold' not in args.given:
        balance_untrained(model, data, device, args, say)
    say('thresholds: ' + ' '.join(f'{value:.4g}' for value in model.thresholds))
    extra = {'classes': data.classes, 'trained_on': split.all_trainings(args, data, start)}
    own = files.is_own(source, paths)
    done, best, fresh = state['epoch'] if source else 0, state['best'] if own else None, not own
    history = state['history'] if source else []
    if history and 'ann_accuracy' in history[0] and not args.test_only:  # a resumed run says what it began with, too
        found = {key: history[0][key] for key in MEASURED if key in history[0]}
        results += [('ANN', found['ann_accuracy']), ('converted SNN', history[0][f'{chosen_on}_accuracy'])]
    if args.test_only or not source and (args.pretrained_ann or args.pretrained_snn):
        # a curve costs nothing: logits after t steps are W times the spikes so far
        at = time_steps(100)
        start, curve = engine.test_over_time(model, getattr(data, chosen_on), loss_function, device, args, test_say, at)
        what = 'loaded' if state else 'converted' if args.pretrained_ann else 'untrained'
        results.append((f'{what} SNN', start.accuracy))
        say(f'{what} SNN: {chosen_on} accuracy {start.accuracy:.2%} at T = {args.timesteps}, loss {start.loss:.4f}')
        say(f'{chosen_on} accuracy after time steps: ' + ', '.join(
            f'{t}: {value:.2%}' for t, value in zip(at, curve) if t in time_steps(10)))
        if not args.test_only:
            best, fresh = [start.accuracy, 0], False
            if distributed.is_main():
                files.set_aside(paths, say)
            history.append({'epoch': 0, f'{chosen_on}_loss': start.loss, f'{chosen_on}_accuracy': start.accuracy,
                            **found, 'curve': dict(zip(map(str, at), curve))})
            engine.save(paths, True, best, model, optimizer, args, history, accuracy=start.accuracy, epoch=0, **extra)
    if not args.test_only:
        best = engine.fit(model, optimizer, data, loss_function, device, args, paths, extra, say, patience=5,
                          fresh=fresh, history=history, done=done, best=best, train_say_every=args.train_acc_batches,
                          test_say=test_say, board=board, trained_as=state['args'] if source else None)
        results.append((f'SNN, best epoch ({best[1]})', best[0]))
    say('\n'.join(['', f'{"":<24}{f"{chosen_on} accuracy":>20}{"time steps":>12}',
                   *(f'{what:<24}{accuracy:>20.2%}{"-" if what == "ANN" else args.timesteps:>12}'
                     for what, accuracy in results)]))
    if not args.test_only:
        say(f'saved in {paths.best}')
    if args.report:
        tested = source or args.pretrained_snn
        if not args.test_only:
            tested, at = paths.best, time_steps(100)
            _, curve = engine.test_over_time(model, data.test, loss_function, device, args, None, at)
        ann_accuracy = dict(results).get('ANN') if chosen_on == 'test' else None
        if distributed.is_main():
            report.write(args.report, model, data, device, args, at, curve, ann_accuracy, found, tested, say)
    if args.export_nir and distributed.is_main():
        say(nir_export.export(model, data.input_shape, args.export_nir, architecture=args.architecture,
                              dataset=args.dataset))


if __name__ == '__main__':
    options.run(main, get_args_parser().parse_args(), 'snn.py')
