"""From an ANN's checkpoint to a spiking network, its thresholds balanced or taken from the cache."""
import tempfile

from experiment import UserError, checkpoint, distributed, engine, setup
from experiment.data import epoch_loader
from self_models.conversion import find_thresholds


def balanced_thresholds(model, data, args, say):
    """Thresholds of the converted network, before scaling: from the cache beside the ANN, or balanced now."""
    settings = {'architecture': args.architecture, 'dataset': args.dataset, 'data_dir': args.data_dir,
                'image_size': args.image_size,
                'train_samples': args.train_samples, 'validation_fraction': args.validation_fraction,
                'samples': args.calibration_samples,
                'timesteps': args.calibration_timesteps, 'default_threshold': args.default_threshold,
                'seed': args.seed}
    key = checkpoint.thresholds_key(model, settings)
    thresholds, note = checkpoint.cached_thresholds(args.pretrained_ann, key, model.balanced)
    say(note)
    if thresholds is None:
        seed = engine.seed_for(args.seed, 0)
        engine.seed_all(seed)
        images, _ = next(iter(epoch_loader(data.train, args.calibration_samples, seed=seed, shuffle=True)))
        try:
            thresholds = find_thresholds(model, images, args.calibration_timesteps, progress=True)
        except ValueError as error:
            raise UserError(f'{error} (--calibration_timesteps, --calibration_samples)') from error
        except OSError as error:
            raise UserError(f'{tempfile.gettempdir()}: no room for spikes ({error.strerror}); set TMPDIR to '
                            'a larger place, or lower --calibration_samples or --calibration_timesteps') from error
        try:
            checkpoint.cache_thresholds(args.pretrained_ann, key, thresholds)
        except UserError as error:
            say(f'thresholds are not cached: {error}')
    return thresholds


def convert(model, data, chosen_on, device, args, say):
    """Load the ANN's weights, balance and scale the thresholds; says and returns the ANN's accuracy.

    chosen_on: 'test' or 'validation', the set that the accuracy is of.
    """
    state = checkpoint.load(args.pretrained_ann, 'ann')
    checkpoint.load_weights(model, state, args.pretrained_ann)
    ann = setup.build_ann(args, data).to(device)
    checkpoint.load_weights(ann, state, args.pretrained_ann)
    accuracy = engine.test(ann, getattr(data, chosen_on), engine.cross_entropy, device, args).accuracy
    say(f'ANN {args.pretrained_ann}: {chosen_on} accuracy {accuracy:.2%}')
    thresholds = distributed.from_main(lambda: balanced_thresholds(model, data, args, say))
    model.threshold_update(args.scaling_factor, thresholds)
    return accuracy
