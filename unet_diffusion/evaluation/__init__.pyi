from .classifier import ImageClassifier as ImageClassifier
from .feature_networks import FeatureNetwork as FeatureNetwork
from .feature_networks import feature_network as feature_network
from .generation_metrics import frechet_distance as frechet_distance
from .generation_metrics import kernel_distance as kernel_distance
from .generation_metrics import precision_recall as precision_recall
from .mask_scores import Scores as Scores
from .mask_scores import score_masks as score_masks
