"""The plain PyTorch loop itself, for its start-up and its memory."""

from work import plain_rounds, plain_tune, serve

if __name__ == "__main__":
    serve(plain_rounds, plain_tune)
