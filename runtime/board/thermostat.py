"""Pausing a training while the board is too hot."""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_bcs.core.errors import EdgeBcsError
from edge_bcs.core.machine import Sensor, ThisMachine

HYSTERESIS = 5.0  # °C
SECONDS_BETWEEN_READINGS = 1.0  # some sensors take milliseconds to read


class Thermostat:
    """Lets a training run until the hottest sensor reaches ``limit`` °C, then only once it has cooled to
    ``limit`` − 5 °C.

    Args:
        limit: °C. machine: whose sensors. sleep, clock: for tests.

    Attributes:
        paused_seconds: time spent waiting so far. pauses: how often.

    Raises EdgeBcsError for a limit out of range, or where no sensor can be read, then or later.
    """

    def __init__(
        self,
        limit: float,
        machine: ThisMachine | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 30 <= limit <= 120:
            raise EdgeBcsError(f"the highest temperature must lie between 30 and 120 °C, not {limit:g}.")
        self.limit, self._machine = limit, machine or ThisMachine()
        self._sleep, self._clock = sleep, clock
        self._next_reading = clock()
        self.paused_seconds, self.pauses = 0.0, 0
        self.hottest()

    def hottest(self) -> Sensor:
        """Read the sensors, return the hottest."""
        sensors = self._machine.temperatures()
        if not sensors:
            raise EdgeBcsError(
                "this machine shows no temperature in /sys/class/thermal or /sys/class/hwmon: leave "
                "--max-temp out, or load the sensor's driver."
            )
        return max(sensors, key=lambda sensor: sensor.celsius)

    def wait(self, on_wait: Callable[[str], None], until: float = float("inf")) -> None:
        """Return at once if it is cool enough, else when it is or when the clock shows ``until``.

        ``on_wait`` is called once a second with the sentence that tells why; it may raise to end the waiting.
        """
        now = self._clock()
        if now < self._next_reading:
            return
        self._next_reading = now + SECONDS_BETWEEN_READINGS
        sensor = self.hottest()
        if sensor.celsius < self.limit:
            return
        self.pauses += 1
        began = now
        try:
            sentence = (
                f"paused: {sensor.name} reached {sensor.celsius:.0f} °C; goes on at "
                f"{self.limit - HYSTERESIS:.0f} °C"
            )
            while sensor.celsius > self.limit - HYSTERESIS and self._clock() < until:
                on_wait(sentence)
                self._sleep(SECONDS_BETWEEN_READINGS)
                sensor = self.hottest()
        finally:
            self.paused_seconds += self._clock() - began
