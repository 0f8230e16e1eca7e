package main

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Many Services without a flag: every one answers, and the agent stays small.
// The bounds are memory, not time; the time is printed.
func TestManyServices(t *testing.T) {
	type size struct{ services, endpoints, megabytes int }
	sizes := []size{{10_000, 2, 80}, {30_000, 4, 150}}
	if os.Getenv("MILLRACE_LONG") != "" {
		sizes = append(sizes, size{100_000, 4, 450})
	}
	for _, size := range sizes {
		t.Run(fmt.Sprintf("%dx%d", size.services, size.endpoints), func(t *testing.T) {
			n := newNode(t)
			for from := 0; from < size.services; from += 1000 {
				path := filepath.Join(n.manifests, fmt.Sprintf("part%03d.json", from/1000))
				if err := os.WriteFile(path, thousand(from, size.endpoints), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			n.start()
			answered := n.connectToAll(size.services)
			s, err := n.status()
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d of %d answered; agent %s resident, maps %s; from Snapshot to read back %.0f ms",
				answered, size.services, bytesText(s.Memory.ResidentBytes), bytesText(s.Memory.MapBytes), s.Layers[0].LongestApplyMS)
			if answered != size.services {
				t.Errorf("only %d of %d Services answer", answered, size.services)
			}
			if resident := s.Memory.ResidentBytes; resident > uint64(size.megabytes)*1e6 {
				t.Errorf("the agent has %s, more than %d MB", bytesText(resident), size.megabytes)
			}
		})
	}
}

func vip(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 96 + byte(i>>16), byte(i >> 8), byte(i)})
}

// thousand is a List of the Services from..from+999 and their EndpointSlices.
// Every endpoint is an address of its own in 10.128.0.0/12.
func thousand(from, endpoints int) []byte {
	var text bytes.Buffer
	text.WriteString(`{"apiVersion":"v1","kind":"List","items":[`)
	for i := from; i < from+1000; i++ {
		if i > from {
			text.WriteByte(',')
		}
		fmt.Fprintf(&text, `{"apiVersion":"v1","kind":"Service","metadata":{"name":"svc-%05[1]d","namespace":"default"},
"spec":{"clusterIP":"%[2]s","clusterIPs":["%[2]s"],"selector":{"app":"svc-%05[1]d"},"ports":[{"name":"http","port":80,"protocol":"TCP","targetPort":8080}]}},
{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{"name":"svc-%05[1]d-a","namespace":"default","labels":{"kubernetes.io/service-name":"svc-%05[1]d"}},
"addressType":"IPv4","ports":[{"name":"http","protocol":"TCP","port":8080}],"endpoints":[`, i, vip(i))
		for j := range endpoints {
			if j > 0 {
				text.WriteByte(',')
			}
			k := i*endpoints + j
			fmt.Fprintf(&text, `{"addresses":["10.%d.%d.%d"],"conditions":{"ready":true},"nodeName":"node-%d","targetRef":{"kind":"Pod","name":"svc-%05d-%d","namespace":"default"}}`,
				128+k>>16, k>>8&255, k&255, k%100, i, j)
		}
		text.WriteString(`]}`)
	}
	text.WriteString(`]}`)
	return text.Bytes()
}

// connectToAll asks every Service once and counts the answers. One server
// listens on every endpoint's address.
func (n *node) connectToAll(services int) (answered int) {
	n.t.Helper()
	n.AddAddress("10.128.0.0/12") // with it the whole range is this host's (route "local")
	err := n.Inside(func() error {
		listener, err := net.Listen("tcp4", "0.0.0.0:8080")
		if err != nil {
			return err
		}
		defer listener.Close()
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				conn.Write([]byte("hello"))
				conn.Close()
			}
		}()
		for i := range services {
			if asked(netip.AddrPortFrom(vip(i), 80)) == nil {
				answered++
			}
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return answered
}

func asked(to netip.AddrPort) error {
	conn, err := net.DialTimeout("tcp4", to.String(), 5*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	_, err = conn.Read(make([]byte, 8))
	return err
}
