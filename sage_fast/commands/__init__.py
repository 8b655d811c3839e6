"""What each command of the shell does, in one line; the commands, a file for each kind of them, are beside it."""

SUMMARIES = {
    "train": "every stage of training, from a folder of seen categories to a model",
    "train-gan": "stage 1: generator and discriminator",
    "train-encoder": "stage 2: the encoder, image to codes",
    "embed": "stage 3: the codes of every image",
    "train-dictionary": "stage 4: the category-irrelevant directions; writes the model",
    "generate": "new images of novel categories from a few images of each",
    "verify": "whether everything that generate was to make is there, whole and as recorded",
    "regenerate": "one image of a manifest again",
    "invert": "the latents of images, by optimisation",
    "evaluate": "how well generated images keep their category, and how much they differ",
    "inspect": "what a file of networks holds, and what can be done with it",
    "convert": "the networks of a file in another format",
    "quality": "how near a generator is to images that it was not trained on",
    "curves": "the losses and scores of a training run as pictures",
    "runs": "the training runs below a folder: stages, steps, losses, scores, time, size",
    "export": "the networks as ONNX files or torch.export programs, checked",
    "info": "what was built, and which kernels run where",
    "profile": "where a synthesis spends its time, layer by layer",
    "data": "write a data set: 'data flora'; divide your own: 'data split'",
    "demo": "the whole road with the model that comes with the package",
}
