package fault

import (
	"context"
	"os"
	"slices"
	"sync"
	"testing"
	"time"
)

const asWorker = "fault-worker"

// TestMain lets the test binary be the process of a client.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == asWorker {
		os.Exit(WorkerMain(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// Every fault takes, by either family: its application sees what it should, and a
// healthy run sees nothing wrong.
func TestEveryFaultTakes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	slots := make(chan struct{}, 8)
	var all sync.WaitGroup
	for _, c := range slices.Concat(AsListed(), Variants(), Controls()) {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			take(t, c)
		})
	}
	all.Wait()
}

func take(t *testing.T, c Case) {
	self, err := os.Executable()
	if err != nil {
		t.Error(err)
		return
	}
	stage, err := c.Open(context.Background(), []string{self, asWorker})
	if err != nil {
		t.Error(err)
		return
	}
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
	defer stop()
	stage.Send(ctx)
	if err := stage.Check(); err != nil {
		t.Error(err)
	}
	t.Logf("%s %s: %s", c.Kind, c.Name(), stage.Outcomes())
	if err := stage.Close(); err != nil {
		t.Error(err)
	}
}
