package lab

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/millrace/millrace/model"
)

// needLarge skips what takes half a minute or two thousand megabytes.
func needLarge(t *testing.T) {
	t.Helper()
	needRoot(t)
	if os.Getenv("MILLRACE_LAB_LARGE") == "" {
		t.Skip("takes long: set MILLRACE_LAB_LARGE=1 to run it")
	}
}

// TestLarge brings up 300 pods on 3 nodes behind 30 Services and reports what
// that costs.
func TestLarge(t *testing.T) {
	needLarge(t)
	s := &model.Snapshot{Number: 1, Complete: true, Workloads: []*model.Workload{deployment("client", 1)}}
	for i := range 30 {
		name := fmt.Sprintf("shop-%d", i)
		replicas := 10
		if i == 0 {
			replicas = 9
		}
		s.Workloads = append(s.Workloads, deployment(name, replicas, webPorts...))
		s.Services = append(s.Services, service(name, model.ServicePort{Protocol: model.TCP, Port: 80, TargetName: "web"}))
	}
	free, start := memAvailable(t), time.Now()
	l := up(t, "large", s, func(c *Config) {
		c.Nodes = 3
		c.Progress = func(line string) { t.Logf("%5.1f s: %s", time.Since(start).Seconds(), line) }
	})
	t.Logf("up after %.2f s", time.Since(start).Seconds())
	status := l.await("all pods are ready", func(s *Status) bool { return s.Up })
	total := 0
	for _, p := range status.Pods {
		if !p.Ready {
			t.Errorf("pod %s is not ready", p)
		}
		total += pss(t, p.Pid)
	}
	t.Logf("%d pods: PSS %d MiB in all, %d KiB each; memory available went down by %d MiB",
		len(status.Pods), total>>10, total/len(status.Pods), (free-memAvailable(t))>>10)
	t.Logf("daemon (this test process) PSS %d MiB", pss(t, os.Getpid())>>10)
	start = time.Now()
	if err := l.Down(l.ctx); err != nil {
		t.Fatal(err)
	}
	err := <-l.done
	l.done <- err
	t.Logf("down after %.2f s", time.Since(start).Seconds())
}

// TestReplaceUnderLoad replaces ten pods a second for 30 s, while a client
// calls 200 times a second whatever is published as ready. Nothing may fail.
func TestReplaceUnderLoad(t *testing.T) {
	needLarge(t)
	l := up(t, "churn", shop(20), func(c *Config) { c.Nodes, c.Drain = 3, 3*time.Second })
	client := l.await("up", func(s *Status) bool { return s.Up }).podsOf("client")[0]
	ctx, cancel := context.WithTimeout(l.ctx, 30*time.Second)
	defer cancel()
	var replaced, calls, failed, slowest atomic.Int64
	var group sync.WaitGroup
	group.Go(func() {
		every(ctx, 100*time.Millisecond, func() {
			start := time.Now()
			if _, err := l.Replace(l.ctx, l.pickPod()); err == nil {
				replaced.Add(1)
				slowest.Store(max(slowest.Load(), time.Since(start).Milliseconds()))
			}
		})
	})
	group.Go(func() {
		every(ctx, 5*time.Millisecond, func() {
			var answers []Answer
			target := l.pickEndpoint()
			err := postJSON(l.ctx, client.Socket, "POST", "/call", CallRequest{Target: target}, &answers)
			calls.Add(1)
			if err != nil || answers[0].Error != "" {
				failed.Add(1)
				t.Errorf("call %s: %v %v", target, err, answers)
			}
		})
	})
	group.Wait()
	t.Logf("%d replaced, the slowest in %d ms; %d calls, %d failed", replaced.Load(), slowest.Load(), calls.Load(), failed.Load())
	if replaced.Load() < 290 {
		t.Errorf("only %d pods replaced in 30 s: want ten a second", replaced.Load())
	}
}

// every starts f again and again until ctx ends, and waits for all to end.
func every(ctx context.Context, period time.Duration, f func()) {
	var group sync.WaitGroup
	defer group.Wait()
	for tick := time.NewTicker(period); ; {
		select {
		case <-tick.C:
			group.Go(f)
		case <-ctx.Done():
			return
		}
	}
}

// pickEndpoint is a random published, ready endpoint of the Service web.
func (l *live) pickEndpoint() string {
	b := l.pickBackend()
	return b.Address.String()
}

// pickPod is the pod behind one.
func (l *live) pickPod() string { return l.pickBackend().Pod.String() }

func (l *live) pickBackend() model.Backend {
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	var ready []model.Backend
	for _, b := range l.store.services[model.Name{Namespace: "default", Name: "web"}].Ports[0].Backends {
		if b.Ready {
			ready = append(ready, b)
		}
	}
	return ready[rand.IntN(len(ready))]
}

// pss is a process's share of memory in KiB (proc(5), smaps_rollup).
func pss(t *testing.T, pid int) int {
	return field(t, fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss:")
}

func memAvailable(t *testing.T) int { return field(t, "/proc/meminfo", "MemAvailable:") }

func field(t *testing.T, path, name string) int {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), name); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("%s has no %s", path, name)
	return 0
}
