package bench

// The operations that can be measured.
const (
	// Connection is connect, 64 bytes there, 64 bytes back, close.
	Connection = "connection"
	// Request is 64 bytes there and 64 bytes back on a connection that is open.
	Request = "request"
)

// DefaultOperations are those measured when none are named.
var DefaultOperations = []string{Connection, Request}

// warmUp is how often a slice does the operation before it counts: that brings
// the variant's code and tables back into the caches.
var warmUp = map[string]int{Connection: 20, Request: 50, Datagram: 2}

// MetricP50 is the name of the median time of an operation.
func MetricP50(operation string) string { return operation + " p50" }

// MetricP99 is the name of the time that 99 of 100 operations do not exceed.
func MetricP99(operation string) string { return operation + " p99" }

// MetricCPU is the name of the processor time of an operation.
func MetricCPU(operation string) string { return "cpu per " + operation }

// MetricCount is the name of the number of operations.
func MetricCount(operation string) string { return operation + "s" }

// MetricErrors is the name of the number of operations that went wrong.
func MetricErrors(operation string) string { return operation + " errors" }

// The metrics of a variant that belong to no operation.
const (
	// MetricLoad is from nothing to every Service answering.
	MetricLoad = "load time"
	// MetricChange is from one endpoint of one Service replaced to that in force.
	MetricChange = "change time"
	// MetricKernel is what the kernel holds for the Services, as it says itself.
	MetricKernel = "kernel memory"
	// MetricResident is the resident memory of the process that serves.
	MetricResident = "resident memory"
)

// figures are the metrics of a turn: name, unit, value, and whether a ratio
// means anything.
var figures = []struct {
	metric   func(operation string) string
	unit     string
	compared bool
	of       func(outcome) float64
}{
	{MetricP50, "us", true, func(o outcome) float64 { return float64(o.P50) / 1e3 }},
	{MetricP99, "us", true, func(o outcome) float64 { return float64(o.P99) / 1e3 }},
	{MetricCPU, "us", true, func(o outcome) float64 { return float64(o.CPU) / 1e3 / float64(max(o.Count, 1)) }},
	{MetricCount, "count", false, func(o outcome) float64 { return float64(o.Count) }},
	{MetricErrors, "count", false, func(o outcome) float64 { return float64(o.Errors) }},
}
