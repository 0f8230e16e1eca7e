package bench

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/millrace/millrace/model"
)

// One endpoint is replaced and brought back at most this often, and only while
// all changes together took less than the time.
const (
	maxReplacements = 10
	changeTime      = 600 * time.Millisecond
)

// change replaces one endpoint of the tested Service by the spare one, proves
// that connections reach it and not the one that went, brings that back, and
// proves that too, some times over. The Service ends as it began.
func (c *cell) change(ctx context.Context, service *model.Service) error {
	if c.loaded.change == nil {
		return nil
	}
	changed := withReplacedEndpoint(service)
	var sum time.Duration
	for i := 0; i < maxReplacements && sum < changeTime; i++ {
		for _, step := range [][2]*model.Service{{service, changed}, {changed, service}} {
			took, err := c.loaded.change(ctx, step[0], step[1])
			if err == nil {
				err = c.prove(addresses(step[1]))
			}
			if err != nil {
				return fmt.Errorf("change an endpoint: %w", err)
			}
			c.changes = append(c.changes, took)
			sum += took
		}
	}
	return nil
}

// prove makes connections until every backend has answered one. An answer of
// another one is an error. It gives up after so many that an even choice among
// 200 backends would not have missed one in 10^15 runs.
func (c *cell) prove(backends []netip.AddrPort) error {
	missing := map[string]bool{}
	for _, backend := range backends {
		missing[backend.String()] = true
	}
	left := len(missing)
	for range 40 * len(backends) {
		result, err := c.bed.clientProcess.tell(command{Targets: c.targets})
		if err != nil {
			return err
		}
		if result.Errors > 0 {
			return fmt.Errorf("connect to %s: %s", c.targets[0], result.FirstError)
		}
		unmet, known := missing[result.Backend]
		if !known {
			return fmt.Errorf("connect to %s: %s answered, which is not behind it", c.targets[0], result.Backend)
		}
		if unmet {
			missing[result.Backend] = false
			left--
		}
		if left == 0 {
			return nil
		}
	}
	return fmt.Errorf("connect to %s: %d of %d backends never answered", c.targets[0], left, len(backends))
}
