"""Health of a run: collapse metrics, the watchdog, alerts."""
