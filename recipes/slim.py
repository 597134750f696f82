"""Write a checkpoint to share: without its optimizer, and with the weights of its layers in 16 bits.

    python recipes/slim.py trained_models/snn/mine.pth shared.pth

Training can start from it, with --pretrained_ann or --pretrained_snn, but not resume. Rounding the weights (float16, 11
bits) may move the accuracy by a few images: test the new file.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiment import UserError, checkpoint, files, options  # noqa: E402
from experiment.trained_on import OF_A_FOLDER  # noqa: E402

KEPT = ('accuracy', 'epoch', 'classes', 'trained_on', 'thresholds', 'timesteps', 'activation', 'leak', 'leaks', 'args')


def slim(state: dict) -> dict:
    """What of a checkpoint a network needs to be tested, to predict and to be trained on.

    Weights of convolutions and linear layers become float16; vectors, as of batch norm, stay as they are.
    """
    def usual(entry):  # where the pictures lie here is nobody's business
        folder = entry.get('data_dir')
        own = entry['dataset'] in OF_A_FOLDER
        return {**entry, 'data_dir': f'~/Datasets/{Path(folder).name}' if own else folder and '~/Datasets'}

    kept = {key: state[key] for key in KEPT if key in state}
    kept |= {'args': usual(state['args']), 'trained_on': [each and usual(each) for each in state['trained_on']]}
    weights = {name: value.half() if value.dtype == torch.float32 and value.dim() > 1 else value
               for name, value in state['state_dict'].items()}
    return {**kept, 'state_dict': weights}


def main(source: str, target: str) -> None:
    if not Path(source).is_file():
        raise UserError(f'{source}: there is no such file; give a checkpoint that ann.py or snn.py wrote')
    state = checkpoint.read(source)
    if not (isinstance(state, dict) and {'args', 'trained_on', 'state_dict'} <= state.keys()
            and 'dataset' in state['args']):
        raise UserError(f'{source}: does not say what it was trained on; give a checkpoint that ann.py or snn.py wrote')
    files.write_atomically(Path(target), partial(torch.save, slim(state)))
    print(f'{target}: {Path(target).stat().st_size:,} bytes')


if __name__ == '__main__':
    parser = options.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='CHECKPOINT')
    parser.add_argument('target', metavar='NEW_FILE')
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        options.fail('slim.py', str(error))
