package healthcheck

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"runtime"
	"testing"

	"github.com/millrace/millrace/model"
)

// BenchmarkSnapshot is what a change costs in a large cluster, of whose Services
// one in a hundred has a port of its own: the checks, and that nothing is to do.
func BenchmarkSnapshot(b *testing.B) {
	s := &model.Snapshot{}
	for i := range 10_000 {
		service := &model.Service{ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})}, Ports: []model.ServicePort{{}}}
		if i%100 == 0 {
			service.HealthCheckPort = uint16(40000 + i/100)
		}
		for j := range 4 {
			service.Ports[0].Backends = append(service.Ports[0].Backends, backend(fmt.Sprint("n", j), fmt.Sprintf("10.244.%d.1:80", j), true))
		}
		s.Services = append(s.Services, service)
	}
	server := &Server{Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	defer server.Close()
	bring := func() error {
		return server.Bring(Places{Ranges: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}}.Listeners(Of(s, "n1"), addresses("127.0.0.1"), nil, func() bool { return true }))
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	if err := bring(); err != nil {
		b.Skip(err)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	for b.Loop() {
		if err := bring(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(after.HeapAlloc+after.StackInuse-before.HeapAlloc-before.StackInuse)/100, "bytes/listener")
}
