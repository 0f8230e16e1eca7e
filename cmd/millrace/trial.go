package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/lab"
	"github.com/millrace/millrace/model"
)

// trial is a load on all Services while something happens to the cluster.
type trial struct {
	What string `json:"what"`
	// Events is how often it happened, over Seconds.
	Events     int            `json:"events"`
	Seconds    float64        `json:"seconds"`
	Operations int            `json:"operations"`
	Failed     int            `json:"failed"`
	Failures   map[string]int `json:"failures,omitempty"`
	Examples   []string       `json:"examples,omitempty"`
	// P50 and P99 are the means of the clients' own, in microseconds.
	P50 int64 `json:"p50_us"`
	P99 int64 `json:"p99_us"`
}

const (
	// loadRate is connections a second over all clients together, half as many
	// datagrams on top.
	loadRate    = 200
	loadClients = 4
	// replaceRate is pods replaced a second.
	replaceRate = 10
)

// replaceUnderLoad replaces pods behind Services, ten a second, under a steady
// load of new connections and datagrams.
func replaceUnderLoad(ctx context.Context, client *lab.Client, p *progress, seconds int) (*trial, error) {
	what := fmt.Sprintf("pods replaced, %d a second, each draining for 3 s", replaceRate)
	return underLoad(ctx, client, seconds, what, func(ctx context.Context, until time.Time, clients map[string]bool) (int, error) {
		group, ctx := errgroup.WithContext(ctx)
		group.SetLimit(2 * replaceRate)
		tick := time.NewTicker(time.Second / replaceRate)
		defer tick.Stop()
		replaced := 0
		busy := &leaving{names: clients}
		for time.Now().Before(until) && ctx.Err() == nil {
			<-tick.C
			victim, err := busy.choose(ctx, client)
			if err != nil {
				return replaced, err
			}
			if victim == "" {
				continue // all that may go are going already
			}
			replaced++
			p.say(fmt.Sprintf("replacing endpoints under load: %d replaced", replaced))
			group.Go(func() error {
				_, err := client.Replace(ctx, victim)
				return err
			})
		}
		p.done()
		return replaced, group.Wait()
	})
}

// leaving are the pods that may not be replaced: the load's clients, and those
// that are being replaced.
type leaving struct {
	mu    sync.Mutex
	names map[string]bool
}

// choose picks a pod at random.
func (l *leaving) choose(ctx context.Context, client *lab.Client) (string, error) {
	status, err := client.Status(ctx)
	if err != nil {
		return "", err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var free []string
	for _, pod := range status.Pods {
		if pod.Ready && pod.Workload != "" && !l.names[pod.String()] {
			free = append(free, pod.String())
		}
	}
	if len(free) == 0 {
		return "", nil
	}
	chosen := free[rand.IntN(len(free))]
	l.names[chosen] = true
	return chosen, nil
}

// killAgents kills the nodes' agents in turn with SIGKILL, each as soon as the
// last one is ready again, under load and with steady endpoints.
func killAgents(ctx context.Context, client *lab.Client, p *progress, kills int) (*trial, error) {
	what := "agents killed with SIGKILL and started again"
	return underLoad(ctx, client, kills, what, func(ctx context.Context, _ time.Time, _ map[string]bool) (int, error) {
		for i := range kills {
			status, err := client.Status(ctx)
			if err != nil {
				return i, err
			}
			node := status.Nodes[i%len(status.Nodes)]
			if err := client.KillAgent(ctx, node.Node); err != nil {
				return i, err
			}
			p.say(fmt.Sprintf("killing agents under load: %d of %d", i+1, kills))
			_, err = client.Await(ctx, func(s *lab.Status) bool {
				now := s.Node(node.Node)
				return now != nil && now.Agent != nil && now.Agent.Ready && now.Agent.Restarts > node.Agent.Restarts
			})
			if err != nil {
				return i, err
			}
		}
		p.done()
		return kills, nil
	})
}

// underLoad runs do while pods call all Services, and adds up what they met.
func underLoad(ctx context.Context, client *lab.Client, seconds int, what string,
	do func(ctx context.Context, until time.Time, clients map[string]bool) (int, error)) (*trial, error) {
	status, err := client.Status(ctx)
	if err != nil {
		return nil, err
	}
	loads, clients := loadsOf(status, seconds)
	t := &trial{What: what, Failures: map[string]int{}}
	begun := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	var mu sync.Mutex
	for _, l := range loads {
		group.Go(func() error {
			result, err := client.Load(ctx, l.pod, l.request)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			t.add(l.pod, result, len(loads))
			return nil
		})
	}
	group.Go(func() (err error) {
		t.Events, err = do(ctx, begun.Add(time.Duration(seconds)*time.Second), clients)
		return err
	})
	err = group.Wait()
	t.Seconds = time.Since(begun).Seconds()
	return t, err
}

type podLoad struct {
	pod     string
	request lab.LoadRequest
}

// loadsOf spreads the load over a few pods, each with connections to every TCP
// port of every Service with endpoints, and datagrams to every UDP port.
func loadsOf(status *lab.Status, seconds int) (loads []podLoad, clients map[string]bool) {
	targets := map[model.Protocol][]string{}
	for _, service := range status.Services {
		for _, port := range service.Ports {
			for _, address := range service.ClusterIPs {
				if !service.Headless && len(port.Endpoints) > 0 {
					targets[port.Protocol] = append(targets[port.Protocol], netip.AddrPortFrom(address, port.Port).String())
				}
			}
		}
	}
	clients = map[string]bool{}
	var ready []string
	for _, pod := range status.Pods {
		if pod.Ready {
			ready = append(ready, pod.String())
		}
	}
	step := max(1, len(ready)/loadClients)
	for i := 0; i < len(ready) && len(clients) < loadClients; i += step {
		pod := ready[i]
		clients[pod] = true
		request := lab.LoadRequest{Rate: loadRate / loadClients, Duration: 1000 * seconds}
		request.Proto, request.Targets = lab.ProtoTCP, targets[model.TCP]
		loads = append(loads, podLoad{pod, request})
		if len(targets[model.UDP]) > 0 {
			request.Proto, request.Targets, request.Rate = lab.ProtoSend, targets[model.UDP], request.Rate/2
			loads = append(loads, podLoad{pod, request})
		}
	}
	return loads, clients
}

func (t *trial) add(pod string, r *lab.LoadResult, of int) {
	t.Operations += r.Operations
	t.Failed += r.Failed
	t.P50 += r.P50 / int64(of)
	t.P99 += r.P99 / int64(of)
	for kind, n := range r.Failures {
		t.Failures[kind] += n
	}
	for _, e := range r.Examples {
		if len(t.Examples) < mostExamples {
			t.Examples = append(t.Examples, fmt.Sprintf("%s -> %s after %d ms: %s", pod, e.Target, e.After, e.Answer.Error))
		}
	}
}

func (t *trial) print() {
	fmt.Printf("%d %s\n", t.Events, t.What)
	fmt.Printf("  %d connections and datagrams to every Service in %.0f s: %s  (p50 %d us, p99 %d us)\n", t.Operations,
		t.Seconds, failures(t.Failed), t.P50, t.P99)
	for _, kind := range slices.Sorted(maps.Keys(t.Failures)) {
		fmt.Printf("  %d %s\n", t.Failures[kind], kind)
	}
	printExamples(t.Examples)
}

// agentFigure is what a node's agent says of itself.
type agentFigure struct {
	Node            string         `json:"node"`
	AttachedAfterMS float64        `json:"attached_after_ms"`
	Memory          agent.Memory   `json:"memory"`
	Latency         *agent.Latency `json:"latency,omitempty"`
	Restarts        int            `json:"restarts"`
}

func agentFigures(ctx context.Context, client *lab.Client) ([]agentFigure, error) {
	status, err := client.Status(ctx)
	if err != nil {
		return nil, err
	}
	var figures []agentFigure
	for _, node := range status.Nodes {
		var a agent.Status
		if err := agent.Ask(ctx, filepath.Clean(node.RunFolder), "/status", &a); err != nil {
			return nil, err
		}
		figures = append(figures, agentFigure{node.Node, a.AttachedAfterMS, a.Memory, a.Latency, node.Agent.Restarts})
	}
	return figures, nil
}

func printAgents(figures []agentFigure) {
	t := newTable(os.Stdout, "AGENT", "START TO ATTACHED", "MEMORY", "MAPS", "CHANGE TO KERNEL p50", "p99", "RESTARTS")
	for _, f := range figures {
		p50, p99 := "-", "-"
		if f.Latency != nil {
			p50, p99 = fmt.Sprintf("%.2f ms", f.Latency.P50MS), fmt.Sprintf("%.2f ms", f.Latency.P99MS)
		}
		t.row(f.Node, fmt.Sprintf("%.0f ms", f.AttachedAfterMS), bytesText(f.Memory.ResidentBytes), bytesText(f.Memory.MapBytes),
			p50, p99, fmt.Sprint(f.Restarts))
	}
	t.print()
}
