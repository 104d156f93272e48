"""The bundle's package: a shell around installed code."""
