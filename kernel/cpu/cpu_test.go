package cpu

import (
	"runtime"
	"testing"
)

func TestCount(t *testing.T) {
	for text, want := range map[string]int{"0": 1, "0-1": 2, "0-3,8": 5, "0,2,4-7": 6} {
		if got, err := count(text); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "0-", "a", "0,,1"} {
		if got, err := count(text); err == nil {
			t.Errorf("%q: %d and no error", text, got)
		}
	}
}

func TestOnlineIsAtLeastWhatWeMayUse(t *testing.T) {
	n, err := Online()
	if err != nil {
		t.Fatal(err)
	}
	if n < runtime.NumCPU() {
		t.Errorf("%d processors, and this process may use %d", n, runtime.NumCPU())
	}
}
