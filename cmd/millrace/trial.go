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
	"strings"
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
	// Events is how often it happened, in EventSeconds; the load lasted Seconds.
	Events       int            `json:"events"`
	EventSeconds float64        `json:"event_seconds"`
	Seconds      float64        `json:"seconds"`
	Operations   int            `json:"operations"`
	Failed       int            `json:"failed"`
	Failures     map[string]int `json:"failures,omitempty"`
	Examples     []string       `json:"examples,omitempty"`
	// P50 and P99 are the means of the clients' own, Max is the longest operation
	// of all, in microseconds.
	P50 int64 `json:"p50_us"`
	P99 int64 `json:"p99_us"`
	Max int64 `json:"max_us"`

	loads int64
}

// ok: something happened, operations were tried meanwhile, and none failed.
func (t *trial) ok() bool { return t.Events > 0 && t.Operations > 0 && t.Failed == 0 }

const (
	// loadRate is connections a second over all clients together, half as many
	// datagrams on top.
	loadRate    = 200
	loadClients = 4
	// replaceRate is pods replaced a second.
	replaceRate = 10
	// replacePatience is how long one replacement may take.
	replacePatience = 60 * time.Second
	// loadSlice is how long a client calls before it looks whether it is over.
	loadSlice = 2 * time.Second
)

// replaceUnderLoad replaces pods behind Services, ten a second, under a steady
// load of new connections and datagrams.
func replaceUnderLoad(ctx context.Context, client *lab.Client, p *progress, window time.Duration) (*trial, error) {
	what := "pods replaced, each draining for 3 s"
	return underLoad(ctx, client, window, what, func(ctx context.Context, until time.Time, clients map[string]bool) (int, error) {
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
				ctx, cancel := context.WithTimeout(ctx, replacePatience)
				defer cancel()
				if _, err := client.Replace(ctx, victim); err != nil {
					return fmt.Errorf("replace pod %s: %w", victim, err)
				}
				return nil
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
	ready := map[string]int{}
	for _, pod := range readyPods(status) {
		ready[pod.Workload]++
	}
	for _, pod := range readyPods(status) {
		// A StatefulSet's only pod goes before its successor comes: its Service
		// is empty meanwhile, as in Kubernetes.
		alone := ready[pod.Workload] == 1 && !strings.HasPrefix(pod.Workload, "Deployment ") && !strings.HasPrefix(pod.Workload, "ReplicaSet ")
		if pod.Workload != "" && !alone && !l.names[pod.String()] {
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
	// A pod that ends while its node's agent is away cannot be told from one that is
	// there: those of the trial before are to be gone.
	nobodyLeaves := func(s *lab.Status) bool {
		return !slices.ContainsFunc(s.Pods, func(p lab.PodStatus) bool { return p.Terminating })
	}
	if _, err := client.Await(ctx, nobodyLeaves); err != nil {
		return nil, err
	}
	return underLoad(ctx, client, time.Duration(kills)*time.Second, what, func(ctx context.Context, _ time.Time, _ map[string]bool) (int, error) {
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

// underLoad runs do while pods call all Services, for at least the window
// and until do has ended, and adds up what they met.
func underLoad(ctx context.Context, client *lab.Client, window time.Duration, what string,
	do func(ctx context.Context, until time.Time, clients map[string]bool) (int, error)) (*trial, error) {
	status, err := client.Status(ctx)
	if err != nil {
		return nil, err
	}
	loads, clients := loadsOf(status)
	t := &trial{What: what, Failures: map[string]int{}}
	begun := time.Now()
	until := begun.Add(window)
	ended := make(chan struct{})
	group, ctx := errgroup.WithContext(ctx)
	var mu sync.Mutex
	for _, l := range loads {
		group.Go(func() error {
			for !over(ended, until) {
				result, err := client.Load(ctx, l.pod, l.request)
				if err != nil {
					return err
				}
				mu.Lock()
				t.add(l.pod, result)
				mu.Unlock()
			}
			return nil
		})
	}
	group.Go(func() (err error) {
		defer close(ended)
		t.Events, err = do(ctx, until, clients)
		t.EventSeconds = time.Since(begun).Seconds()
		return err
	})
	err = group.Wait()
	t.Seconds = time.Since(begun).Seconds()
	t.P50, t.P99 = t.P50/max(1, t.loads), t.P99/max(1, t.loads)
	return t, err
}

func over(ended <-chan struct{}, until time.Time) bool {
	select {
	case <-ended:
		return time.Now().After(until)
	default:
		return false
	}
}

type podLoad struct {
	pod     string
	request lab.LoadRequest
}

// loadsOf spreads the load over a few pods, each with connections to every TCP
// port of every Service with endpoints, and datagrams to every UDP port.
func loadsOf(status *lab.Status) (loads []podLoad, clients map[string]bool) {
	targets := map[model.Protocol][]string{}
	for _, service := range status.Services {
		for _, port := range service.Ports {
			for _, address := range service.ClusterIPs {
				if !service.Headless && served(port, address) {
					targets[port.Protocol] = append(targets[port.Protocol], netip.AddrPortFrom(address, port.Port).String())
				}
			}
		}
	}
	clients = map[string]bool{}
	ready := readyPods(status)
	// at least half of the pods stay free to be replaced
	step := max(2, len(ready)/loadClients)
	for i := 0; i < len(ready) && len(clients) < loadClients; i += step {
		pod := ready[i].String()
		clients[pod] = true
		request := lab.LoadRequest{Rate: loadRate / loadClients, Duration: int(loadSlice.Milliseconds())}
		if len(targets[model.TCP]) > 0 {
			request.Proto, request.Targets = lab.ProtoTCP, targets[model.TCP]
			loads = append(loads, podLoad{pod, request})
		}
		if len(targets[model.UDP]) > 0 {
			request.Proto, request.Targets, request.Rate = lab.ProtoSend, targets[model.UDP], request.Rate/2
			loads = append(loads, podLoad{pod, request})
		}
	}
	return loads, clients
}

// served says whether an address has an endpoint of its family that is ready.
func served(port lab.PortStatus, address netip.Addr) bool {
	return slices.ContainsFunc(port.Endpoints, func(e lab.EndpointStatus) bool {
		return e.Ready && e.Address.Addr().Is4() == address.Is4()
	})
}

func (t *trial) add(pod string, r *lab.LoadResult) {
	t.Operations += r.Operations
	t.Failed += r.Failed
	t.loads++
	t.P50 += r.P50
	t.P99 += r.P99
	t.Max = max(t.Max, r.Max)
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
	fmt.Printf("%d %s; %.1f a second\n", t.Events, t.What, float64(t.Events)/t.EventSeconds)
	if t.Events == 0 || t.Operations == 0 {
		fmt.Println(red("  nothing to do it to: it takes pods of workloads, and Services with endpoints"))
	}
	fmt.Printf("  %d connections and datagrams to every Service in %.0f s: %s  (p50 %d us, p99 %d us, longest %.1f ms)\n", t.Operations,
		t.Seconds, failures(t.Failed), t.P50, t.P99, float64(t.Max)/1000)
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
	// Events is what the programs counted, by reason.
	Events map[string]uint64 `json:"events"`
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
		figure := agentFigure{node.Node, a.AttachedAfterMS, a.Memory, a.Latency, node.Agent.Restarts, map[string]uint64{}}
		for _, l := range a.Layers {
			maps.Copy(figure.Events, l.Reasons)
		}
		figures = append(figures, figure)
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
