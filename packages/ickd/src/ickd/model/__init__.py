"""Networks: the CIFAR zoo, DeepLabV3+, and the small ones of the embedded tasks."""
