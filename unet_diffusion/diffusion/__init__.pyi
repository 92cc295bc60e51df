from .low_resolution import enlarged as enlarged
from .low_resolution import shrunk as shrunk
from .low_resolution import with_noise as with_noise
from .objectives import min_snr_weight as min_snr_weight
from .objectives import noise_prediction_loss as noise_prediction_loss
from .objectives import prediction_target as prediction_target
from .objectives import signal_to_noise as signal_to_noise
from .sampling import sampler as sampler
