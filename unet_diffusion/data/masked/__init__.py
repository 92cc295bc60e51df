"""Many images with masks: from what a user names to sets that training and validation read."""
