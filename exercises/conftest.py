"""`pytest exercises` checks the learner's file; `pytest exercises --solutions` the library's functions."""


def pytest_addoption(parser):
    parser.addoption("--solutions", action="store_true", help="check the library's functions, not exercises/ppo.py")
