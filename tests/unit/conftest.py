from hypothesis import settings

# The machines that run this are shared: how long an example takes says nothing.
settings.register_profile("evenkeel", deadline=None, print_blob=True)
settings.load_profile("evenkeel")
