from .config import DataConfig as DataConfig
from .dataset import ImageDataset as ImageDataset
from .dataset import to_batch as to_batch
from .sets import ImageSets as ImageSets
from .sets import load_images as load_images
from .streaming import StreamingImages as StreamingImages
