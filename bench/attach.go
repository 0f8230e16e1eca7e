package bench

import (
	"context"
	"time"

	"github.com/millrace/millrace/model"
)

// AttachSpec is what a variant under test works with.
type AttachSpec struct {
	// NetNS is the path of the node's network namespace.
	NetNS string
	// Cgroup is the cgroup2 folder of the client, and of no other process.
	Cgroup string
	// Services are all to be loaded, before Attach returns, sorted by name as in
	// a model.Snapshot.
	Services []*model.Service
}

// Attached is a variant under test, at work.
type Attached struct {
	// LoadTime is from nothing to every Service answering: loading and attaching
	// the programs included.
	LoadTime time.Duration
	// KernelBytes is the memory of the maps, 0 if it is not known.
	KernelBytes uint64
	// ResidentBytes is the resident memory of the process that serves, at rest
	// after the load; 0 if it is not known or serves something else too.
	ResidentBytes uint64
	// Change puts a Service in force in the place of the one of the same name, and
	// says how long that took, from knowing it to having read back what was
	// written. Without it nothing is changed.
	Change func(*model.Service) (time.Duration, error)
	// Close takes everything away again.
	Close func() error
}

// Attach loads the Services and attaches the programs. An error leaves nothing,
// and ends the run.
type Attach func(AttachSpec) (Attached, error)

// loadAttached is the loader of a variant under test.
func loadAttached(attach Attach) loader {
	return func(_ context.Context, b *bed, services []*model.Service) (loaded, error) {
		var result loaded
		spec := AttachSpec{NetNS: b.node, Cgroup: b.clientGroup, Services: inNameOrder(services)}
		for {
			attached, err := attach(spec)
			if err != nil {
				return result, err
			}
			result.times = append(result.times, attached.LoadTime)
			result.kernelBytes, result.residentBytes = attached.KernelBytes, attached.ResidentBytes
			result.detach = attached.Close
			if attached.Change != nil {
				result.change = func(_ context.Context, _, to *model.Service) (time.Duration, error) {
					return attached.Change(to)
				}
			}
			if !again(result.times) {
				return result, nil
			}
			result.detach = nil
			if err := attached.Close(); err != nil {
				return result, err
			}
		}
	}
}
