"""One file an operator: what it computes, its schema, fake, autograd and autocast."""
