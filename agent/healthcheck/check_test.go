package healthcheck

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/millrace/millrace/model"
)

func backend(node, address string, ready bool) model.Backend {
	return model.Backend{Address: netip.MustParseAddrPort(address), Node: node, Ready: ready, Serving: true}
}

func addresses(texts ...string) (all []netip.Addr) {
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

// A dual-stack Service with two ports and pods on two nodes: each family counts its
// own endpoints, a pod once, and those that are not ready not at all.
func TestChecksOfANode(t *testing.T) {
	s := &model.Snapshot{Services: []*model.Service{
		{Name: model.Name{Namespace: "shop", Name: "web"}, HealthCheckPort: 30100, ClusterIPs: addresses("10.96.0.2", "fd00::2"), Ports: []model.ServicePort{
			{Backends: []model.Backend{backend("n1", "10.244.1.1:80", true), backend("n1", "10.244.1.2:80", false), backend("n2", "10.244.2.1:80", true), backend("n1", "[fd00:1::1]:80", true)}},
			{Backends: []model.Backend{backend("n1", "10.244.1.1:443", true), backend("n1", "10.244.1.3:443", true)}},
		}},
		{Name: model.Name{Namespace: "shop", Name: "plain"}, ClusterIPs: addresses("10.96.0.3")},
	}}
	for node, want := range map[string][]Check{
		"n1": {{model.Name{Namespace: "shop", Name: "web"}, 30100, false, 2}, {model.Name{Namespace: "shop", Name: "web"}, 30100, true, 1}},
		"n2": {{model.Name{Namespace: "shop", Name: "web"}, 30100, false, 1}, {model.Name{Namespace: "shop", Name: "web"}, 30100, true, 0}},
		"n3": {{model.Name{Namespace: "shop", Name: "web"}, 30100, false, 0}, {model.Name{Namespace: "shop", Name: "web"}, 30100, true, 0}},
	} {
		if got := Of(s, node); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, want %+v", node, got, want)
		}
	}
}

// nodePortAddresses decide where checks are answered, as kube-proxy reads them.
func TestPlaces(t *testing.T) {
	has := addresses("127.0.0.1", "192.0.2.7", "10.1.0.7", "::1", "fd00::7")
	primary := addresses("192.0.2.7", "fd00::7")
	ranges := func(texts ...string) (p Places) {
		for _, text := range texts {
			p.Ranges = append(p.Ranges, netip.MustParsePrefix(text))
		}
		return p
	}
	for _, row := range []struct {
		what   string
		at     Places
		v4, v6 string
	}{
		{"nothing said: all", Places{}, "0.0.0.0", "::"},
		{"primary", Places{Primary: true}, "192.0.2.7", "fd00::7"},
		{"a range of one family: the other has all", ranges("10.0.0.0/8"), "10.1.0.7", "::"},
		{"ranges that overlap", ranges("10.0.0.0/8", "10.1.0.0/16", "fd00::/64"), "10.1.0.7", "fd00::7"},
		{"all by name, beside a range", ranges("10.0.0.0/8", "0.0.0.0/0", "fd00::/64"), "0.0.0.0", "fd00::7"},
		{"a range in which the node has nothing", ranges("203.0.113.0/24", "fd99::/64"), "", ""},
		{"loopback, if it is asked for", ranges("127.0.0.0/8", "::1/128"), "127.0.0.1", "::1"},
	} {
		t.Run(row.what, func(t *testing.T) {
			for is6, want := range map[bool]string{false: row.v4, true: row.v6} {
				got := fmt.Sprint(row.at.at(is6, has, primary))
				if got != "["+want+"]" {
					t.Errorf("IPv6 %v: %s, want [%s]", is6, got, want)
				}
			}
		})
	}
	if at := (Places{Primary: true}).at(false, has, addresses("198.51.100.1")); len(at) > 0 {
		t.Errorf("an address that is on no device (a NAT's): %v", at)
	}
}

// get asks a handler.
func get(t *testing.T, h http.Handler, path string) (int, http.Header, map[string]any) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	var body map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
		t.Fatalf("%s: %v", w.Body, err)
	}
	return w.Code, w.Result().Header, body
}

// What a load balancer reads: kube-proxy's status, weight and body.
func TestAnswerOfACheck(t *testing.T) {
	for _, row := range []struct {
		local int
		well  bool
		code  int
	}{{2, true, 200}, {0, true, 503}, {2, false, 503}} {
		c := Check{model.Name{Namespace: "shop", Name: "web"}, 30100, false, row.local}
		code, header, body := get(t, c.answer(func() bool { return row.well }), "/any/path")
		want := map[string]any{"service": map[string]any{"namespace": "shop", "name": "web"}, "localEndpoints": float64(row.local), "serviceProxyHealthy": row.well}
		if code != row.code || header.Get("X-Load-Balancing-Endpoint-Weight") != fmt.Sprint(row.local) ||
			header.Get("Content-Type") != "application/json" || !reflect.DeepEqual(body, want) {
			t.Errorf("%d endpoints, well %v: %d %v %v", row.local, row.well, code, header, body)
		}
	}
}

// A proxy's life: traffic comes once Services are in the kernel, stays while
// changes get there, and goes with the node; only changes that get stuck are a
// reason to restart it.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h Health
		var counted []int
		count := func(code int) { counted = append(counted, code) }
		says := func(when string, healthz, livez int) map[string]any {
			t.Helper()
			a, _, body := get(t, h.Healthz(count), "/healthz")
			b, _, _ := get(t, h.Livez(count), "/livez")
			if a != healthz || b != livez {
				t.Errorf("%s: healthz %d, livez %d, want %d and %d", when, a, b, healthz, livez)
			}
			for _, field := range []string{"lastUpdated", "currentTime", "nodeEligible", "healthy"} {
				if _, ok := body[field]; !ok {
					t.Errorf("%s: no %s in %v", when, field, body)
				}
			}
			return body
		}
		says("at first", 503, 200)
		h.Asked()
		h.Done(false)
		says("of a cluster that is not whole yet", 503, 200)
		h.Asked()
		h.Done(true)
		if body := says("once it is whole", 200, 200); body["status"].(map[string]any)["IPv6"] == nil {
			t.Errorf("%v", body)
		}
		time.Sleep(time.Hour)
		if body := says("an hour without changes", 200, 200); body["lastUpdated"] != body["currentTime"] {
			t.Errorf("%v", body)
		}
		h.Asked()
		time.Sleep(patience - time.Second)
		h.Asked()
		says("a change that takes its time", 200, 200)
		time.Sleep(time.Second)
		if body := says("a change that is stuck", 503, 503); body["healthy"] != false || h.Well() {
			t.Errorf("%v, well %v", body, h.Well())
		}
		h.Done(false)
		says("it got through", 200, 200)
		h.Leaving(true)
		if body := says("the node is no more", 503, 200); body["nodeEligible"] != false {
			t.Errorf("%v", body)
		}
		if !slices.Equal(counted[:4], []int{503, 200, 503, 200}) {
			t.Errorf("counted %v", counted)
		}
		var restarted Health
		restarted.TookOver()
		h.Asked()
		if code, _, _ := get(t, restarted.Healthz(count), "/healthz"); code != 200 {
			t.Errorf("an agent that took Services over: %d", code)
		}
	})
}
