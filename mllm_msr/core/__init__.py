"""What every other package uses: errors, files, settings, tables, devices."""
