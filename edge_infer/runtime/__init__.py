"""The device half that runs models: sessions, engines, the self-test, the device command line."""
