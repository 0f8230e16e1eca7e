package bench

import (
	"os"
	"testing"
)

// TestMain makes this test binary its own worker, as the product is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "bench-worker" {
		os.Exit(WorkerMain(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "bench-forever" {
		os.Exit(forever())
	}
	os.Exit(m.Run())
}
