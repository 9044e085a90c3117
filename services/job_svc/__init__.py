"""Jobs, their queue and logs, fine-tuned models, and credits."""
