"""What plugs persimmon_fast into other libraries. Each module imports its library when it is first used."""
