"""Classify pictures with a trained spiking network."""
import argparse
import os

import torch

from experiment import UserError, checkpoint, data, engine, options, setup, start
from self_models import INPUT_SHAPES


def lines(args: argparse.Namespace, device: torch.device) -> list[str]:
    """A line for each picture of args.predict: its likeliest classes with their confidences, the softmax of the output.

    Raises UserError for pictures and checkpoints that cannot be read.
    """
    path = args.pretrained_snn
    if not path:
        raise UserError('--predict: name the network with --pretrained_snn')
    given, args.given = args.given, args.given & options.PREDICTING
    start.choose_backend(args, device)
    for file in args.predict:
        if not os.path.isfile(file):
            raise UserError(f'--predict: {file}: is not a file; name pictures, such as new/*.jpg')
    state = checkpoint.load(path, 'snn')
    if not isinstance(state.get('classes'), list):
        raise UserError(f'--predict: {path} does not name its classes; train it for one more epoch with '
                        '--pretrained_snn, which adds them')
    said, args.given = [start.adopt(args, state, path)], given
    kept = args.keep_batch_norm  # the file decides, whatever the flag says
    said += start.drop_idle(args)
    args.keep_batch_norm = kept
    if args.dataset not in INPUT_SHAPES:
        raise UserError(f'--predict: {path} is of an unknown data set {args.dataset}; name one whose images have '
                        'the same shape with --dataset')
    shape = setup.input_shape(args)
    model = setup.build_snn(args, data.Data(None, None, state['classes'], shape), state).to(device).eval()
    checkpoint.load_snn(model, state, path, leaks='leak' not in args.given)
    if silent := setup.too_few_steps(model):
        said.append(silent)
    for file in args.predict:  # an error first; they are read again, as together they may be more than memory holds
        data.picture(file, args.dataset, shape)
    logits = []
    with torch.no_grad(), engine.autocast(device, args.amp):
        for file in args.predict:  # one by one, each from the same seed, so that the other pictures do not matter
            engine.seed_all(args.seed)
            logits.append(model(data.picture(file, args.dataset, shape)[None].to(device)).float())
    logits = torch.cat(logits)
    confidences = (logits if args.output == 'sum' else logits / args.timesteps).softmax(1)
    for file, values, order in zip(args.predict, *confidences.topk(min(3, len(state['classes'])))):
        said.append(f'{file}: ' + ', '.join(
            f'{state["classes"][i]} {value:.1%}' for value, i in zip(values.tolist(), order.tolist())))
    return said
