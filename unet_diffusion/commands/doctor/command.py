"""The command doctor: examines a data set before training, and reports findings in sentences."""

from dataclasses import fields

from unet_diffusion.commands.doctor.findings import Report
from unet_diffusion.commands.options.doctor import Doctor
from unet_diffusion.data.config import DataConfig, ImageOptions
from unet_diffusion.data.masked.config import MaskedDataConfig


def doctor(options: Doctor) -> Report:
    """Examines the data set that the options name.

    Raises:
        ValueError: the source, a split or a column does not exist.
    """
    from unet_diffusion.commands.doctor.examination import examine  # here, since it takes seconds to import

    config: DataConfig | MaskedDataConfig = options
    if options.plain:
        # training on images alone has another default for validation_fraction
        names = [field.name for field in fields(ImageOptions) if field.name != "validation_fraction"]
        shared = {name: getattr(options, name) for name in names}
        config = DataConfig(
            **shared,
            label_column=options.label_column,
            crop_size=options.crop_size,
            max_images=options.max_labels,
        )
        config.validation_fraction = 0.0  # so that the report does not mention it
    return examine(config, options.errors_only)
