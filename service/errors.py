"""What a request can be refused for; ``service.http.problems`` says how that looks over HTTP."""


class UnknownIndex(ValueError):  # noqa: N818 - named for what is wrong, as all of these
    """No index is served under this name."""


class BadQuery(ValueError):  # noqa: N818
    """A question that cannot be measured."""


class UnknownEstimator(ValueError):  # noqa: N818
    """This version has no estimator of this name."""


class UnknownJob(ValueError):  # noqa: N818
    """There is no job with this id; never, or no longer."""


class MalformedBody(ValueError):  # noqa: N818
    """The body cannot be read as JSON."""


class Unauthorised(RuntimeError):  # noqa: N818
    """No key came with the request, or a wrong one."""


class Forbidden(RuntimeError):  # noqa: N818
    """A page of another site sent the request."""


class WrongHost(RuntimeError):  # noqa: N818
    """The request names a host that this service is not."""


class Conflict(RuntimeError):  # noqa: N818
    """The request contradicts an earlier one."""


class TooLarge(RuntimeError):  # noqa: N818
    """The body has more bytes than the service accepts."""


class HeadTooLarge(RuntimeError):  # noqa: N818
    """Address and headers have more bytes than the service accepts."""


class TooSlow(RuntimeError):  # noqa: N818
    """The body did not arrive in time."""


class WrongContentType(RuntimeError):  # noqa: N818
    """The body is not called JSON, or is compressed."""


class Overloaded(RuntimeError):  # noqa: N818
    """As many queries are under way as the service accepts."""


class TooManyJobs(RuntimeError):  # noqa: N818
    """As many jobs are kept as the service accepts."""


class JobsOff(RuntimeError):  # noqa: N818
    """The service keeps no jobs."""


class ProcessEnded(RuntimeError):  # noqa: N818
    """The process ended again and again while it computed this query of a job."""


class DeadlinePassed(RuntimeError):  # noqa: N818
    """The query's deadline passed before its turn came."""


class NotReady(RuntimeError):  # noqa: N818
    """The model or an index is not loaded yet."""


class ShuttingDown(RuntimeError):  # noqa: N818
    """The service is about to end and takes nothing new."""


class ClientGone(RuntimeError):  # noqa: N818
    """The client hung up before its query's turn came; nobody reads this."""


class RunFault(ValueError):  # noqa: N818
    """A recorded training run cannot be used; ``service.run.errors`` has its kinds."""
