package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// LoadRequest asks a pod to call at a steady rate.
type LoadRequest struct {
	// Proto is one of the Proto constants; empty is tcp.
	Proto string `json:"proto"`
	// Targets are "address:port"; operations go to each in turn.
	Targets []string `json:"targets"`
	// Rate is operations a second. An operation is a new connection, a request,
	// its answer, compared, and the close. It starts when it is due, whether or
	// not earlier ones have ended, up to 2,048 in flight.
	Rate float64 `json:"rate"`
	// Duration of the load and Timeout of one operation, in milliseconds. A
	// Duration of 0 is until Client.EndLoads, and until Least operations have
	// begun; a Timeout of 0 is two seconds.
	Duration int `json:"duration_ms"`
	Least    int `json:"least,omitempty"`
	Timeout  int `json:"timeout_ms,omitempty"`
	// Keep above 0 asks on so many long-living connections or sockets (tcp, udp or
	// sendto) in turn instead. One that fails is opened anew; the failure counts.
	// With Stay, so does an answer of another pod than the connection's first one.
	Keep int  `json:"keep,omitempty"`
	Stay bool `json:"stay,omitempty"`
}

// LoadResult is what came of it.
type LoadResult struct {
	// Operations that were due, Succeeded and Failed, which add up.
	Operations int `json:"operations"`
	Succeeded  int `json:"succeeded"`
	Failed     int `json:"failed"`
	// Failures counts by kind (the Failure constants); Examples are the first few.
	Failures map[string]int `json:"failures,omitempty"`
	Examples []LoadExample  `json:"examples,omitempty"`
	// Backends counts answers by pod, "namespace/name".
	Backends map[string]int `json:"backends"`
	// P50 and P99 of successful operations, and the longest, in microseconds.
	P50 int64 `json:"p50_us"`
	P99 int64 `json:"p99_us"`
	Max int64 `json:"max_us"`
	// Reconnects counts long-living connections opened anew.
	Reconnects int `json:"reconnects,omitempty"`
}

// LoadExample is one failure.
type LoadExample struct {
	// After is when it began, in milliseconds from the start of the load.
	After  int64  `json:"after_ms"`
	Target string `json:"target"`
	Answer Answer `json:"answer"`
}

const (
	maxInFlight = 2048
	maxExamples = 10
	maxSamples  = 1 << 20 // latencies kept; later ones no longer count in P50 and P99
)

// tally gathers results from many goroutines.
type tally struct {
	mu      sync.Mutex
	start   time.Time
	result  LoadResult
	samples []int64
}

func (t *tally) add(started time.Time, target string, a Answer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.result.Operations++
	if a.Error == "" {
		t.result.Succeeded++
		t.result.Backends[a.Pod]++
		if len(t.samples) < maxSamples {
			t.samples = append(t.samples, a.Micros)
		}
		return
	}
	t.result.Failed++
	t.result.Failures[a.Kind]++
	if len(t.result.Examples) < maxExamples {
		example := LoadExample{After: started.Sub(t.start).Milliseconds(), Target: target, Answer: a}
		t.result.Examples = append(t.result.Examples, example)
	}
}

func (t *tally) finish() *LoadResult {
	t.mu.Lock()
	defer t.mu.Unlock()
	slices.Sort(t.samples)
	if n := len(t.samples); n > 0 {
		t.result.P50, t.result.P99, t.result.Max = t.samples[n/2], t.samples[n*99/100], t.samples[n-1]
	}
	return &t.result
}

// runLoad does the work and returns when the last operation has ended. A
// caller that goes away ends it early.
func runLoad(ctx context.Context, r LoadRequest, end <-chan struct{}) (*LoadResult, error) {
	if len(r.Targets) == 0 || r.Rate <= 0 || r.Duration < 0 {
		return nil, errors.New("a load needs targets, a rate above zero and a duration")
	}
	if r.Keep > 0 && (r.Proto == ProtoHTTP || r.Proto == ProtoGRPC) {
		return nil, fmt.Errorf("long-living connections are for tcp, udp and sendto, not %s", r.Proto)
	}
	t := &tally{start: time.Now()}
	t.result.Backends, t.result.Failures = map[string]int{}, map[string]int{}
	operation := func(i int) (string, Answer) {
		target := r.Targets[i%len(r.Targets)]
		return target, call(r.Proto, target, millis(r.Timeout))
	}
	if r.Keep > 0 {
		pool := newPool(r)
		defer pool.close(t)
		operation = pool.ask
	}
	pace(ctx, r, t, end, operation)
	return t.finish(), nil
}

// over says whether operation i is not to begin any more.
func (r *LoadRequest) over(i int, end <-chan struct{}) bool {
	if r.Duration > 0 {
		return i >= int(r.Rate*float64(r.Duration)/1000)
	}
	select {
	case <-end:
		return i >= r.Least
	default:
		return false
	}
}

// pace starts each operation when it is due and waits for the last.
func pace(ctx context.Context, r LoadRequest, t *tally, end <-chan struct{}, operation func(i int) (string, Answer)) {
	var running sync.WaitGroup
	defer running.Wait()
	slots := make(chan struct{}, maxInFlight)
	for i := 0; !r.over(i, end); i++ {
		due := t.start.Add(time.Duration(float64(i) / r.Rate * float64(time.Second)))
		select {
		case <-time.After(time.Until(due)):
		case <-ctx.Done():
			return
		}
		select {
		case slots <- struct{}{}:
		default:
			t.add(due, r.Targets[i%len(r.Targets)], Answer{Error: FailureBusy, Kind: FailureBusy})
			continue
		}
		running.Go(func() {
			defer func() { <-slots }()
			started := time.Now()
			target, answer := operation(i)
			t.add(started, target, answer)
		})
	}
}

// pool is a number of long-living connections, each used by one at a time.
type pool struct {
	request LoadRequest
	conns   []pooled
}

type pooled struct {
	mu     sync.Mutex
	conn   net.Conn
	pod    string // that answered first
	opened int
}

func newPool(r LoadRequest) *pool { return &pool{request: r, conns: make([]pooled, r.Keep)} }

// ask does operation i on the connection whose turn it is.
func (p *pool) ask(i int) (string, Answer) {
	index := i % len(p.conns)
	c, target := &p.conns[index], p.request.Targets[index%len(p.request.Targets)]
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), millis(p.request.Timeout))
	defer cancel()
	var a Answer
	start := time.Now()
	err := p.askOn(ctx, c, target, &a)
	a.Micros = time.Since(start).Microseconds()
	if err != nil {
		a.Error, a.Kind = err.Error(), kindOf(err)
	}
	return target, a
}

func (p *pool) askOn(ctx context.Context, c *pooled, target string, a *Answer) error {
	if c.conn == nil {
		conn, err := dial(ctx, p.request.Proto, target)
		if err != nil {
			return err
		}
		c.conn, c.pod = conn, ""
		c.opened++
	}
	err := ask(ctx, c.conn, a)
	if c.pod == "" {
		c.pod = a.Pod
	}
	if err == nil && p.request.Stay && a.Pod != c.pod {
		err = fmt.Errorf("%w: %s answers, not %s as before", errWrong, a.Pod, c.pod)
	}
	if err != nil {
		c.conn.Close()
		c.conn = nil
	}
	return err
}

func (p *pool) close(t *tally) {
	for i := range p.conns {
		if p.conns[i].conn != nil {
			p.conns[i].conn.Close()
		}
		t.result.Reconnects += max(0, p.conns[i].opened-1)
	}
}
