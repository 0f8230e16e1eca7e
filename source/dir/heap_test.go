package dir

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/model"
)

// mostLive is what may stay in memory of a cluster of liveServices Services, in
// bytes; the package documentation says what it was last measured at.
const (
	liveServices  = 30_000
	liveEndpoints = 4
	mostLive      = 50_000_000
)

// TestLiveHeap reads Services with an EndpointSlice each and asks what stays in
// memory: the Snapshot and all that the source keeps in order to make the next. It
// asks again when all objects were replaced.
func TestLiveHeap(t *testing.T) {
	if os.Getenv("MILLRACE_LONG") == "" {
		t.Skip("set MILLRACE_LONG=1 to run it")
	}
	t.Chdir(t.TempDir())
	writeCluster(t, "")
	before := live()
	s, err := Open(".")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	delivered, over := make(chan *model.Snapshot, 1), make(chan error, 1)
	go func() { over <- s.Run(ctx, func(s *model.Snapshot) { delivered <- s }) }()
	snapshot := <-delivered
	checkLive(t, "at first", snapshot, before)
	writeCluster(t, "\n")
	for !allFrom(snapshot, 2) {
		snapshot = <-delivered
	}
	checkLive(t, "with each object a line further down", snapshot, before)
	cancel()
	if err := <-over; err != nil {
		t.Error(err)
	}
	runtime.KeepAlive(s)
}

func checkLive(t *testing.T, when string, s *model.Snapshot, before int64) {
	t.Helper()
	used := live() - before
	if n := len(s.Services); n != liveServices || len(s.Problems) > 0 {
		t.Errorf("%s there are %d Services and these problems: %v", when, n, s.Problems)
	}
	t.Logf("%s %.1f MB are live for %d Services of %d endpoints", when, float64(used)/1e6, liveServices, liveEndpoints)
	if used > mostLive {
		t.Errorf("%s %.1f MB are live, which is more than %.1f", when, float64(used)/1e6, float64(mostLive)/1e6)
	}
	runtime.KeepAlive(s)
}

// allFrom says whether all Services come from one line of their files.
func allFrom(s *model.Snapshot, line int) bool {
	return !slices.ContainsFunc(s.Services, func(s *model.Service) bool { return !strings.HasSuffix(s.Where, fmt.Sprint(":", line)) })
}

// live is the size of everything that can still be reached, in bytes.
func live() int64 {
	runtime.GC()
	runtime.GC() // what the first one found unused is counted until it is swept
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// writeCluster writes Lists of a thousand Services with their EndpointSlices, each
// after a text.
func writeCluster(t *testing.T, before string) {
	t.Helper()
	for first := 0; first < liveServices; first += 1000 {
		var items []any
		for i := first; i < first+1000; i++ {
			items = append(items, manifestsOfService(i)...)
		}
		data, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": items})
		if err != nil {
			t.Fatal(err)
		}
		write(t, fmt.Sprintf("part%03d.json", first/1000), before+string(data))
	}
}

func manifestsOfService(i int) []any {
	type object = map[string]any
	name := fmt.Sprintf("svc-%06d", i)
	var endpoints []any
	for j := range liveEndpoints {
		n := i*liveEndpoints + j
		endpoints = append(endpoints, object{
			"addresses":  []string{fmt.Sprintf("10.%d.%d.%d", 128+n>>16, n>>8&255, n&255)},
			"conditions": object{"ready": true},
			"nodeName":   fmt.Sprintf("node-%d", n%100),
			"targetRef":  object{"kind": "Pod", "name": fmt.Sprintf("%s-%d", name, j), "namespace": "default"},
		})
	}
	port := object{"name": "http", "protocol": "TCP", "port": 8080}
	return []any{
		object{
			"apiVersion": "v1", "kind": "Service", "metadata": object{"name": name, "namespace": "default"},
			"spec": object{
				"clusterIP": fmt.Sprintf("10.%d.%d.%d", 96+i>>16, i>>8&255, i&255), "selector": object{"app": name},
				"ports": []any{object{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}},
			},
		},
		object{
			"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
			"metadata": object{"name": name + "-a", "namespace": "default", "labels": object{"kubernetes.io/service-name": name}},
			"ports":    []any{port}, "endpoints": endpoints,
		},
	}
}
