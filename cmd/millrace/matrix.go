package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/millrace/millrace/lab"
	"github.com/millrace/millrace/model"
)

// matrix is every pod calling every Service port over every address.
type matrix struct {
	Calls  int `json:"calls"`
	Failed int `json:"failed"`
	// Rows are the Service ports, Nodes the columns.
	Nodes []string    `json:"nodes"`
	Rows  []matrixRow `json:"rows"`
	// Examples are the first failures.
	Examples []string `json:"examples,omitempty"`

	mu sync.Mutex
}

type matrixRow struct {
	Service string `json:"service"`
	Port    string `json:"port"`
	How     string `json:"how"`
	Address string `json:"address"`
	// Expect is what a call has to find: "answer" or "refused".
	Expect string `json:"expect"`
	// Calls and OK count by node.
	Calls []int `json:"calls"`
	OK    []int `json:"ok"`

	target    string
	endpoints []string
}

const mostExamples = 10

// matrixPatience of each call, in milliseconds: longer than a busy machine stands
// still. A datagram that is lost fails all the same.
const matrixPatience = 10_000

// callEverything lets every pod that is ready call every Service.
func callEverything(ctx context.Context, client *lab.Client, p *progress) (*matrix, error) {
	status, err := client.Status(ctx)
	if err != nil {
		return nil, err
	}
	m := &matrix{}
	for _, node := range status.Nodes {
		m.Nodes = append(m.Nodes, node.Node)
	}
	for _, service := range status.Services {
		for _, port := range service.Ports {
			m.addRows(service, port)
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(4)
	called := 0
	for _, pod := range readyPods(status) {
		group.Go(func() error {
			if err := m.callFrom(ctx, client, pod); err != nil {
				return err
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			called++
			p.say(fmt.Sprintf("every pod calls every Service: %d of %d pods, %d calls", called, len(status.Pods), m.Calls))
			return nil
		})
	}
	err = group.Wait()
	p.done()
	return m, err
}

func readyPods(status *lab.Status) []lab.PodStatus {
	return slices.DeleteFunc(slices.Clone(status.Pods), func(p lab.PodStatus) bool { return !p.Ready })
}

func (m *matrix) addRows(service lab.ServiceStatus, port lab.PortStatus) {
	if service.Headless {
		return
	}
	for _, address := range service.ClusterIPs {
		for _, how := range waysToCall(port) {
			row := matrixRow{
				Service: service.Namespace + "/" + service.Name, Port: fmt.Sprintf("%d/%s", port.Port, port.Protocol),
				How: how, Address: address.String(), Expect: "refused",
				Calls: make([]int, len(m.Nodes)), OK: make([]int, len(m.Nodes)),
				target: netip.AddrPortFrom(address, port.Port).String(),
			}
			for _, e := range port.Endpoints {
				if e.Ready && e.Address.Addr().Is4() == address.Is4() {
					row.Expect, row.endpoints = "answer", append(row.endpoints, e.Pod)
				}
			}
			m.Rows = append(m.Rows, row)
		}
	}
}

// waysToCall goes by the port's name, as appProtocol and service meshes do.
func waysToCall(port lab.PortStatus) []string {
	switch {
	case port.Protocol == model.UDP:
		return []string{lab.ProtoUDP, lab.ProtoSend}
	case port.Protocol != model.TCP:
		return nil // SCTP is not served
	case strings.HasPrefix(port.Name, "http"):
		return []string{lab.ProtoHTTP}
	case strings.HasPrefix(port.Name, "grpc"):
		return []string{lab.ProtoGRPC}
	}
	return []string{lab.ProtoTCP}
}

func (m *matrix) callFrom(ctx context.Context, client *lab.Client, pod lab.PodStatus) error {
	column := slices.Index(m.Nodes, pod.Node)
	for i := range m.Rows {
		row := &m.Rows[i]
		answers, err := client.Call(ctx, pod.String(), lab.CallRequest{Proto: row.How, Target: row.target, Timeout: matrixPatience})
		if err != nil {
			return err
		}
		m.mu.Lock()
		for _, a := range answers {
			m.Calls++
			row.Calls[column]++
			if wrong := row.judge(a); wrong == "" {
				row.OK[column]++
			} else {
				m.Failed++
				if len(m.Examples) < mostExamples {
					m.Examples = append(m.Examples, fmt.Sprintf("%s -> %s %s %s: %s", pod, row.Service, row.How, row.target, wrong))
				}
			}
		}
		m.mu.Unlock()
	}
	return nil
}

// judge says what is wrong with an answer, nothing if it is right: one of the
// Service's own endpoints answered, and the client sees the Service as peer.
func (r *matrixRow) judge(a lab.Answer) string {
	switch {
	case r.Expect == "refused" && a.Kind == lab.FailureRefused:
		return ""
	case r.Expect == "refused":
		return fmt.Sprintf("not refused, though it has no endpoint: %s %s", a.Pod, a.Error)
	case a.Error != "":
		return a.Error
	case !slices.Contains(r.endpoints, a.Pod):
		return fmt.Sprintf("%s answered, which is not one of its endpoints", a.Pod)
	case a.Peer != r.target:
		return fmt.Sprintf("the client sees %s as its peer, not the Service", a.Peer)
	}
	return ""
}

func (m *matrix) print() {
	t := newTable(os.Stdout, append([]string{"SERVICE", "PORT", "CALL", "ADDRESS"}, m.Nodes...)...)
	for _, row := range m.Rows {
		cells := []string{row.Service, row.Port, row.How, row.Address}
		for i := range m.Nodes {
			cell := fmt.Sprintf("%d/%d %s", row.OK[i], row.Calls[i], row.Expect)
			if row.OK[i] != row.Calls[i] {
				cell += " !"
			}
			cells = append(cells, cell)
		}
		t.row(cells...)
	}
	t.print()
	fmt.Printf("%d calls, %s\n", m.Calls, failures(m.Failed))
	printExamples(m.Examples)
}

func failures(n int) string {
	if n == 0 {
		return green("0 failed")
	}
	return red(fmt.Sprintf("%d failed", n))
}

func printExamples(examples []string) {
	for _, e := range examples {
		fmt.Println("  " + e)
	}
}
